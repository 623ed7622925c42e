"""One safetensors file as untrusted input, read a few rows at a time by plain reads: nothing of it stays in memory."""

import os
from math import prod
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from trainer.config.nodes import shown, shown_path
from trainer.convert.foreign_folder import ForeignFolder, parse_object, size_of
from trainer.errors import CheckpointError, DataError

DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES_OF_COUNTS: Final = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
_ALL_DTYPES: Final = {**DTYPES, **DTYPES_OF_COUNTS}
_MAX_HEADER_BYTES: Final = 16 << 20
_MAX_DIMENSIONS: Final = 8


class ShardEntry(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte, from the beginning of the file."""

    @property
    def size_bytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize


class ShardFile:
    """An open safetensors file, whose whole header has been checked."""

    def __init__(self, folder: ForeignFolder, name: str) -> None:
        """Open a file of a folder, and check its header: each byte of the rest belongs to one tensor.

        Raises:
            CheckpointError: if it is damaged.
            DataError: if it cannot be opened.
        """
        self.path = folder.path / name
        self._descriptor = folder.open(name)
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows first .. last - 1 of dimension 0 of a tensor, by default all, in the dtype of the file.

        Raises:
            CheckpointError: if the file has been cut off meanwhile.
        """
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        last = rows if last is None else last
        row_bytes = entry.size_bytes // max(rows, 1)
        shape = (last - first, *entry.shape[1:]) if entry.shape else ()
        tensor = torch.empty(shape, dtype=entry.dtype)
        if tensor.numel():
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            self._fill(data, entry.start + first * row_bytes)
        return tensor

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while len(buffer):
            num_bytes = os.preadv(self._descriptor, [buffer], offset)
            if num_bytes == 0:
                raise self._damaged("it ends too early")
            buffer, offset = buffer[num_bytes:], offset + num_bytes

    def _read_header(self) -> dict[str, ShardEntry]:
        size = size_of(self._descriptor)
        beginning = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or length > size - 8:
            raise self._damaged(f"{size} bytes cannot hold its header")
        if length > _MAX_HEADER_BYTES:
            raise self._damaged(f"a header of {length} bytes, and at most {_MAX_HEADER_BYTES} are read")
        try:
            header = parse_object(os.pread(self._descriptor, length, 8), str(self.path))
        except DataError as error:
            raise CheckpointError(str(error)) from None
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, value in sorted(header.items(), key=lambda item: _offsets(item[1])):
            first, last = _offsets(value)
            entry = self._entry(name, value, 8 + length + first)
            if first != end or last - first != entry.size_bytes:
                raise self._damaged(f"{shown(name)} {list(entry.shape)} is said to be in bytes {first} to {last}")
            entries[name], end = entry, last
        if 8 + length + end != size:
            raise self._damaged(f"it has {size} bytes, and its tensors need {8 + length + end}")
        return entries

    def _entry(self, name: str, value: Any, start: int) -> ShardEntry:
        dtype, shape = (value.get("dtype"), value.get("shape")) if isinstance(value, dict) else (None, None)
        if not isinstance(dtype, str) or dtype not in _ALL_DTYPES:
            readable = ", ".join(_ALL_DTYPES)
            raise self._damaged(f"{shown(name)} has dtype {shown(dtype)}; {readable} are read", advice="")
        is_shape = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
        if not is_shape or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
            raise self._damaged(f"{shown(name)} has no shape")
        return ShardEntry(_ALL_DTYPES[dtype], tuple(shape), start)

    def _damaged(self, reason: str, advice: str = ": download it again") -> CheckpointError:
        return CheckpointError(f"{shown_path(self.path)}: is no safetensors file that can be used: {reason}{advice}")


def _offsets(value: Any) -> tuple[int, int]:
    """Return the bytes that an entry claims; (-1, -1), which fits nowhere, if it is malformed."""
    offsets = value.get("data_offsets") if isinstance(value, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        return -1, -1
    return offsets[0], offsets[1]
