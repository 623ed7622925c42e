"""A checkpoint's manifest: what is in it and where. Read as what it is, a file that anybody may have written.

docs/checkpoint.md describes it for other programs. Imports no torch.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, NonNegativeInt, ValidationError

from trainer.checkpoint.coverage import flaw, missing_names
from trainer.config.base import Config, Problem
from trainer.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
_LARGEST_BYTES = 256 << 20  # a million tensors; a larger one was not written by us

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.safetensors$")]


class _Entry(Config):
    model_config = ConfigDict(extra="ignore")


class StoredFile(_Entry):
    """One safetensors file."""

    size_bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoredSlice(_Entry):
    """Indices start .. start + length - 1 of dimension 0, under the tensor's own name in a file."""

    file: FileName
    start: NonNegativeInt
    length: NonNegativeInt


class StoredTensor(_Entry):
    """One global tensor."""

    dtype: Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    shape: list[NonNegativeInt]
    is_of_experts: bool = False
    """Dimension 0 counts experts."""
    slices: list[StoredSlice]

    @property
    def length(self) -> int:
        """Indices of dimension 0; 1 for a tensor without dimensions."""
        return self.shape[0] if self.shape else 1


class Manifest(_Entry):
    """What a checkpoint is."""

    format: Literal[2]
    step: NonNegativeInt
    """Completed steps."""
    run: dict[str, JsonValue]
    """What describes the run: position, config, fingerprints, versions."""
    values: dict[str, int | float | str]
    """Plain values of the engine's state."""
    tensors: dict[str, StoredTensor]
    files: dict[FileName, StoredFile]

    def problems(self) -> Iterator[Problem]:
        """Check that every index of every tensor is there once, in a file that is listed."""
        for name, tensor in self.tensors.items():
            wrong = flaw(((part.start, part.length) for part in tensor.slices), tensor.length)
            if wrong is not None:
                yield Problem(f"tensors.{name}", wrong)
            for part in tensor.slices:
                if part.file not in self.files:
                    yield Problem(f"tensors.{name}", f"{part.file} is not among the files")
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        experts = [name for name, tensor in self.tensors.items() if tensor.is_of_experts]
        for missing in missing_names(shapes, experts):
            yield Problem("tensors", missing)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files.values())


def manifest_text(manifest: Manifest) -> bytes:
    """Return the file's content: the manifest and its own hash."""
    values = manifest.model_dump(mode="json")
    return json.dumps({**values, "manifest_sha256": _hash(values)}, indent=1).encode()


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: if it is missing, damaged, of another format or does not describe whole tensors.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(_read_regular(path, _LARGEST_BYTES))
        stated = values.pop("manifest_sha256")
        version = values["format"]
        is_intact = stated == _hash(values)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is not a checkpoint") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__})") from None
    if not is_intact:
        raise CheckpointError(f"{path}: is damaged (its hash does not match its content)")
    if version != FORMAT:
        raise CheckpointError(
            f"{folder}: has format {version!r:.20}, this version reads {FORMAT}; use the other version"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: is not sound: {f'{where}: ' if where else ''}{first['msg']:.300}") from None


def check_file(folder: Path, name: str, stated: StoredFile, *, with_content: bool = True) -> None:
    """Compare a file with what the manifest says of it.

    Args:
        folder: of the checkpoint.
        name: of the file.
        stated: its size and hash.
        with_content: read all of it and compare the hash as well.

    Raises:
        CheckpointError: naming the file and the difference.
    """
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: is no regular file")
            if status.st_size != stated.size_bytes:
                raise CheckpointError(f"{path}: is damaged ({status.st_size} bytes instead of {stated.size_bytes})")
            if with_content and hashlib.file_digest(file, "sha256").hexdigest() != stated.sha256:
                raise CheckpointError(f"{path}: is damaged (its SHA-256 is not the one in {MANIFEST})")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _read_regular(path: Path, most_bytes: int) -> bytes:
    """Return a regular file's content; neither a link nor a device nor a flood is followed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most_bytes:
            raise ValueError("not a file of a manifest's size")
        return file.read(most_bytes + 1)


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
