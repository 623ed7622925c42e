"""The weights of a published model: one safetensors file, or several and their index. No pickle is ever read."""

from typing import Final, Self

import torch
from torch import Tensor

from trainer.config.nodes import shown, shown_path
from trainer.convert.foreign_folder import ForeignFolder, is_file_name
from trainer.convert.open_shards import OpenShards
from trainer.convert.shard_file import ShardEntry, ShardFile
from trainer.errors import CheckpointError, DataError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_MAX_INDEX_BYTES: Final = 64 << 20
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")


class SafetensorsFolder:
    """Tensors of a published model, by name."""

    def __init__(self, folder: ForeignFolder) -> None:
        """Read and check the headers of all files.

        Raises:
            CheckpointError: if a file is missing or damaged, or the index and the files disagree.
        """
        self.folder = folder
        self._shards = OpenShards(folder)
        self.entries: dict[str, ShardEntry] = {}
        self._file_of: dict[str, str] = {}
        where = _indexed(folder)
        for file in dict.fromkeys(where.values()) if where is not None else [SINGLE]:
            for name, entry in self._shard(file).entries.items():
                if name in self._file_of:
                    raise self._error(f"{shown(name)} is in {self._file_of[name]} and in {file}; one is too many")
                if where is not None and where.get(name) != file:
                    raise self._error(f"{file} has {shown(name)}, which {INDEX} does not list there")
                self.entries[name], self._file_of[name] = entry, file
        missing = sorted((where or {}).keys() - self.entries.keys())
        if missing:
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            file = (where or {})[missing[0]]
            raise self._error(f"{shown(missing[0])}{others} is not in {file}, where {INDEX} has it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shards.close()

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows first .. last - 1 of dimension 0 of a tensor, by default all, in the dtype on disk."""
        return self._shard(self._file_of[name]).read(name, first, last)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size_bytes for entry in self.entries.values())

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the tensors."""
        return {entry.dtype for entry in self.entries.values()}

    def _shard(self, file: str) -> ShardFile:
        try:
            return self._shards.shard(file)
        except DataError as error:
            raise CheckpointError(str(error)) from None

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{shown_path(self.folder.path)}: {message}; download it again")


def _indexed(folder: ForeignFolder) -> dict[str, str] | None:
    """Return the file of each tensor by the index; None if there is a single file, as transformers prefers."""
    if folder.has(SINGLE):
        return None
    path = shown_path(folder.path)
    if not folder.has(INDEX):
        pickles = sorted(entry.name for entry in folder.path.iterdir() if entry.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{path}: has its weights in {shown(pickles[0])}, a pickle, which can run code and is never read; "
                "convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}, so there are no weights in it")
    try:
        where = folder.json(INDEX, at_most=_MAX_INDEX_BYTES).get("weight_map")
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{path}: {INDEX} has no weight_map; download it again")
    for name, file in where.items():
        if not is_file_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {INDEX} has {shown(name)} in {shown(file)}, no safetensors file beside it")
        if not folder.has(file):
            raise CheckpointError(f"{path}: {shown(file)} is missing, in which {INDEX} has {shown(name)}; download it")
    return where
