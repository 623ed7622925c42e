"""Write a checkpoint of weights that come from elsewhere, a block at a time, so that no whole tensor is in memory.

Moments of the optimizer, which are zero before the first step, may be left out: `manifest.py` allows that at step 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, overload

import torch
from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.manifest import (
    DTYPES,
    FORMAT,
    MANIFEST,
    DType,
    Manifest,
    StoredFile,
    StoredSlice,
    StoredTensor,
)
from trainer.checkpoint.manifest_file import manifest_text
from trainer.checkpoint.plan import Placement
from trainer.checkpoint.tensor_files import FILE_SIZE_BYTES, safetensors_header, write_durably
from trainer.errors import CheckpointError

_BLOCK_BYTES = 32 << 20  # in memory at a time, unless a single index of dimension 0 is larger


class TensorReader(Protocol):
    """Source of tensors, read by global name, some indices of dimension 0 at a time."""

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0, on the CPU, in the dtype to be stored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalTensor:
    """Shape and dtype of a tensor to store; it has at least one dimension."""

    shape: tuple[int, ...]
    dtype: DType = "float32"
    is_of_experts: bool = False
    """Dimension 0 counts experts."""
    is_frozen: bool = False
    """A weight that does not learn, so that it has no moments."""

    @classmethod
    def like(cls, other: Placement | StoredTensor) -> Self:
        """Return the tensor that a rank holds a part of, or that a checkpoint has."""
        return cls(
            shape=tuple(other.shape), dtype=other.dtype, is_of_experts=other.is_of_experts, is_frozen=other.is_frozen
        )

    @property
    def index_bytes(self) -> int:
        """Bytes of one index of dimension 0."""
        return StoredTensor(dtype=self.dtype, shape=list(self.shape), slices=[]).index_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of all of it."""
        return self.index_bytes * self.shape[0]


class _Part:
    """A slice of a tensor that goes into one file."""

    def __init__(self, name: str, tensor: GlobalTensor, start: int, length: int) -> None:
        self.name, self.tensor, self.start, self.length = name, tensor, start, length
        self.shape = (length, *tensor.shape[1:])
        self.size_bytes = length * tensor.index_bytes

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield start and length of each block."""
        most = max(1, _BLOCK_BYTES // max(1, self.tensor.index_bytes))
        for start in range(self.start, self.start + self.length, most):
            yield start, min(most, self.start + self.length - start)


class _FilePieces(Sequence[bytes | memoryview]):
    """The bytes of a file, each block read when it is asked for."""

    def __init__(self, parts: Sequence[_Part], source: TensorReader) -> None:
        self._parts, self._source = parts, source
        self._header = safetensors_header({part.name: (part.tensor.dtype, part.shape) for part in parts})
        self._blocks = [(part, *block) for part in parts for block in part.blocks()]

    def __len__(self) -> int:
        return 1 + len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> bytes | memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes | memoryview]: ...
    def __getitem__(self, index: int | slice) -> bytes | memoryview | Sequence[bytes | memoryview]:
        assert isinstance(index, int), "written one by one"
        if index == 0:
            return self._header
        part, start, length = self._blocks[index - 1]  # IndexError ends the iteration
        block = self._source.read(part.name, start, length)
        assert tuple(block.shape) == (length, *part.tensor.shape[1:]), (part.name, block.shape)
        assert str(block.dtype) == f"torch.{part.tensor.dtype}", (part.name, block.dtype)
        if block.is_floating_point() and not bool(block.isfinite().all()):
            raise CheckpointError(
                f"{part.name}: has values that are not finite; the model that it comes from is broken: use another one"
            )
        return block.contiguous().reshape(-1).view(torch.uint8).numpy().data


def save_streamed(
    folder: CheckpointFolder,
    tensors: Mapping[str, GlobalTensor],
    source: TensorReader,
    run: Mapping[str, Any],
    *,
    values: Mapping[str, int] | None = None,
    file_size_bytes: int = FILE_SIZE_BYTES,
) -> Manifest:
    """Save the checkpoint of step 0 from `source`, whose tensors `tensors` lists; nothing is left if that fails.

    A tensor larger than a file is cut along dimension 0. `run` is the JSON record of the run. `values` are
    scalars of the engine's state; null: those before the first step.

    Raises:
        CheckpointError: if a value is not finite.
        OSError: if the disk refuses.
    """
    folder.begin(0)
    try:
        slices, files = _write_tensors(folder.temporary(0), tensors, source, file_size_bytes)
        stored = {
            name: StoredTensor(
                dtype=tensor.dtype,
                shape=list(tensor.shape),
                is_of_experts=tensor.is_of_experts,
                is_frozen=tensor.is_frozen,
                slices=slices[name],
            )
            for name, tensor in tensors.items()
        }
        counts: dict[str, int | float | str] = {"optimizer_steps": 0, **(values or {})}
        manifest = Manifest(format=FORMAT, step=0, run=dict(run), values=counts, tensors=stored, files=files)
        text = manifest_text(manifest)
        write_durably(folder.temporary(0) / MANIFEST, [text])
        folder.commit(0)
        return manifest
    finally:
        folder.abandon(0)  # nothing, once it is committed


def _write_tensors(
    folder: Path, tensors: Mapping[str, GlobalTensor], source: TensorReader, file_size_bytes: int
) -> tuple[dict[str, list[StoredSlice]], dict[str, StoredFile]]:
    files: dict[str, StoredFile] = {}
    slices: dict[str, list[StoredSlice]] = {name: [] for name in tensors}
    for number, parts in enumerate(_files(tensors, file_size_bytes)):
        file = f"tensors-00000-{number:05d}.safetensors"
        files[file] = write_durably(folder / file, _FilePieces(parts, source))
        for part in parts:
            slices[part.name].append(StoredSlice(file=file, start=part.start, length=part.length))
    return slices, files


def _files(tensors: Mapping[str, GlobalTensor], file_size_bytes: int) -> Iterator[list[_Part]]:
    """Yield the parts of each file, tensors of wider dtypes first so that all are aligned."""
    parts: list[_Part] = []
    size = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -DTYPES[item[1].dtype][0]):
        most = max(1, file_size_bytes // max(1, tensor.index_bytes))
        for start in range(0, tensor.shape[0], most):
            part = _Part(name, tensor, start, min(most, tensor.shape[0] - start))
            if parts and size + part.size_bytes > file_size_bytes:
                yield parts
                parts, size = [], 0
            parts.append(part)
            size += part.size_bytes
    if parts:
        yield parts
