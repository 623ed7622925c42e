"""A safetensors file, read as what it is: a file that anybody may have written.

Imports no torch, and what it needs only where a file is opened: every verb imports this, also to say that a config is
wrong.
"""

import json
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.file_integrity import read_error
from trainer.errors import CheckpointError, first_line

_LARGEST_HEADER_BYTES = 16 << 20
_BLOCK_BYTES = 1 << 18  # looked at together: a processor's cache holds them; a multiple of every number's size
_EXPONENT = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
}
"""A number as an unsigned integer, and the bits that are all set in one that is not finite."""


def open_tensors(path: Path, framework: Literal["pt", "numpy"] = "pt") -> Any:
    """Open a safetensors file whose header is not a flood: what is read of it is several times as large in memory.

    Raises:
        CheckpointError: if it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _LARGEST_HEADER_BYTES:
            raise CheckpointError(f"{path}: is no safetensors file of ours (a header of {header_bytes} bytes)")
        return safe_open(path, framework=framework)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is no safetensors file ({first_line(error):.200})") from None


def check_finite_values(folder: Path, files: Iterable[str]) -> None:
    """See that every number in a checkpoint's files is finite; a run that had diverged may have saved others.

    Args:
        folder: of the checkpoint.
        files: names of safetensors files in it, whose hashes are right.

    Raises:
        CheckpointError: naming the first tensor with a number that is not finite.
        ResourceError: if this process cannot read them now.
    """
    for file in files:
        try:
            name = _first_not_finite(folder / file)
        except OSError as error:
            raise read_error(folder / file, error) from None
        if name is not None:
            raise CheckpointError(f"{folder}: {name} is not finite: the run had diverged when it was saved")


def _first_not_finite(path: Path) -> str | None:
    """Return the name of a file's first tensor that has a number which is not finite, in the order of the file."""
    open_tensors(path, "numpy")  # which sees that the header is whole, and every tensor inside the file
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        places = sorted(
            (entry["data_offsets"], entry["dtype"], name) for name, entry in header.items() if name != "__metadata__"
        )
        for (start, end), dtype, name in places:
            file.seek(8 + length + start)
            if dtype in _EXPONENT and not _is_finite(file, end - start, dtype):
                return name
    return None


def _is_finite(file: BufferedReader, num_bytes: int, dtype: str) -> bool:
    """Read so much of a file, and tell whether every number in it is finite."""
    import numpy as np

    words, exponent = _EXPONENT[dtype]
    block = np.empty(min(num_bytes, _BLOCK_BYTES) // np.dtype(words).itemsize, words)
    is_special = np.empty(block.shape, bool)
    while num_bytes > 0:
        # Into the same memory again and again: to get it anew takes longer than to look at it.
        length = file.readinto(block.data.cast("B")[:num_bytes])
        count = length // block.itemsize
        np.bitwise_and(block[:count], exponent, out=block[:count])
        if np.equal(block[:count], exponent, out=is_special[:count]).any():
            return False
        num_bytes -= length or num_bytes  # a file that has become shorter meanwhile ends it
    return True
