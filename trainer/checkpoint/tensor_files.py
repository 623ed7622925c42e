"""Write a checkpoint's safetensors files with their hashes, and read them slice by slice.

A safetensors file with a flipped bit loads without an error. So every byte is hashed in memory as it is written, and
verified before it is used.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer import fault_injection
from trainer.checkpoint.coverage import is_average, is_moment, weight_of
from trainer.checkpoint.manifest import DTYPES, DType, Manifest, StoredFile, StoredSlice
from trainer.checkpoint.safetensors_file import open_tensors
from trainer.checkpoint.state import Slice, TrainState
from trainer.errors import CheckpointError, first_line

FILE_SIZE_BYTES: Final = 512 << 20
"""Size of a file; a larger tensor gets one of its own."""
PartKey = tuple[str, int]
"""Name of a tensor, and the first index of a part of it."""
_MAX_NAMES = 10_000  # a header entry has less than 1 kB, and headers of up to 16 MiB are read


def files_of(sizes: Mapping[PartKey, int], *, rank: int) -> dict[str, list[PartKey]]:
    """Return the parts in each of a rank's files, given the bytes of all its parts."""
    split = enumerate(_split_into_files(sizes))
    return {f"tensors-{rank:05d}-{number:05d}.safetensors": keys for number, keys in split}


def write_files(folder: Path, tensors: Mapping[PartKey, Tensor], *, rank: int) -> dict[str, StoredFile]:
    """Write tensors on the CPU into the files of a rank, in a folder that other ranks share; flush them to disk.

    Return the size and hash of each file.
    """
    files = {}
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    for file, keys in files_of(sizes, rank=rank).items():
        files[file] = write_durably(folder / file, _as_safetensors({key[0]: tensors[key] for key in keys}))
    return files


def write_durably(path: Path, pieces: Sequence[bytes | memoryview]) -> StoredFile:
    """Write the concatenated pieces to a new file and flush it to disk; return its size and hash."""
    fault_injection.hit("save.before_file")
    hashed = hashlib.sha256()
    with path.open("xb") as file:
        for number, piece in enumerate(pieces):
            if number == len(pieces) // 2:
                fault_injection.hit("save.mid_file")
            hashed.update(piece)
            file.write(piece)
        size_bytes = file.tell()
        file.flush()
        fault_injection.hit("save.file_written")
        os.fsync(file.fileno())
    fault_injection.hit("save.file_synced")
    return StoredFile(size_bytes=size_bytes, sha256=hashed.hexdigest())


def _as_safetensors(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the pieces of a safetensors file: its header, then a view of each tensor's memory, widest dtypes first.

    The safetensors library would copy all tensors while holding the GIL, which would stall the training loop.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {
        name: (str(tensors[name].dtype).removeprefix("torch."), tensors[name].shape) for name in names
    }
    data = [tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data for name in names]
    return [safetensors_header(entries), *data]


def safetensors_header(
    entries: Mapping[str, tuple[DType, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the beginning of a safetensors file of tensors, name -> dtype and shape, in this order.

    8 bytes: N | N bytes: JSON {name: {dtype, shape, data_offsets}}, padded | tensors
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in entries.items():
        element_bytes, kind = DTYPES[dtype]
        size_bytes = prod(shape) * element_bytes
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    return len(text).to_bytes(8, "little") + text


class StoredTensors:
    """Tensors of a verified checkpoint, read on demand."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor."""
        return name in self._manifest.tensors

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0 of a tensor; all of them by default.

        Raises:
            CheckpointError: if its files differ from the manifest.
        """
        stored = self._manifest.tensors[name]
        length = stored.length - start if length is None else length
        pieces = []
        for part in sorted(stored.slices, key=lambda part: part.start):
            first, end = max(start, part.start), min(start + length, part.start + part.length)
            if first < end:
                pieces.append(self._read_part(name, part, first - part.start, end - part.start))
        if not pieces:
            return torch.empty((0, *stored.shape[1:]), dtype=getattr(torch, stored.dtype))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def like(self, state: TrainState) -> TrainState:
        """Return the parts of the tensors that `state` has, read when they are looked up."""
        frozen = {name for name, stored in self._manifest.tensors.items() if stored.is_frozen}
        slices = _Slices(self, state.slices, has_moments=self._manifest.has_moments, frozen=frozen)
        return TrainState(slices=slices, values=self._manifest.values)

    def _read_part(self, name: str, part: StoredSlice, first: int, end: int) -> Tensor:
        """Return indices first .. end - 1 of the slice that a file holds."""
        stored, path = self._manifest.tensors[name], self._folder / part.file
        expected = [part.length, *stored.shape[1:]] if stored.shape else []
        try:
            if part.file not in self._open:
                self._open[part.file] = open_tensors(path)
            kept = stored.kept_as(name)
            view = self._open[part.file].get_slice(kept)
            shape, dtype = view.get_shape(), view.get_dtype()
            if list(shape) != expected or dtype != DTYPES[stored.dtype][1]:
                in_manifest = f"{expected} {stored.dtype} in the manifest"
                raise CheckpointError(f"{path}: {name} is {shape} {dtype} in it, and {in_manifest}")
            return view[first:end] if expected else self._open[part.file].get_tensor(kept)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {first_line(error):.200}") from None


class _Slices(Mapping[str, Slice]):
    """Slices read when they are looked up, so that a state is never in memory twice.

    Moments that the checkpoint does not have are zero, and averages begin at the weights.
    """

    def __init__(
        self, tensors: StoredTensors, like: Mapping[str, Slice], *, has_moments: bool, frozen: Set[str]
    ) -> None:
        self._tensors, self._like, self._has_moments, self._frozen = tensors, like, has_moments, frozen

    def __getitem__(self, name: str) -> Slice:
        like = self._like[name]
        if not self._has_moments and is_moment(name):
            shape = (like.length, *like.global_shape[1:]) if like.global_shape else ()
            return replace(like, tensor=torch.zeros(shape, dtype=like.tensor.dtype))
        stored = weight_of(name) if is_average(name) and not self._tensors.has(name) else name
        pieces = [self._tensors.read(stored, start, length) for _, start, length in like.spans]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return replace(like, tensor=tensor, is_frozen=name in self._frozen)

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


def _split_into_files(sizes: Mapping[PartKey, int]) -> Iterator[list[PartKey]]:
    """Yield the parts of each file: up to its size, and one part of a tensor, which is stored under its name."""
    turn_of, seen = {}, Counter[str]()
    for key in sizes:
        turn_of[key] = seen[key[0]]
        seen[key[0]] += 1
    names: dict[str, PartKey] = {}
    size = 0
    for key in sorted(sizes, key=turn_of.__getitem__):  # every tensor's first part, then every second one
        size_bytes = sizes[key]
        if names and (size + size_bytes > FILE_SIZE_BYTES or len(names) == _MAX_NAMES or key[0] in names):
            yield list(names.values())
            names, size = {}, 0
        names[key[0]] = key
        size += size_bytes
    if names:
        yield list(names.values())
