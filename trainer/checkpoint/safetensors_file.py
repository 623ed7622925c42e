"""Open a safetensors file as untrusted input and check that its values are finite.

Imports no torch, and safetensors and numpy only inside functions: every command imports this module, even to report an
error in a config.
"""

import json
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.file_integrity import read_error
from trainer.errors import CheckpointError, first_line

_LARGEST_HEADER_BYTES = 16 << 20
_BLOCK_BYTES = 1 << 18  # fits in a CPU cache; a multiple of every element size
_EXPONENT = {
    **{"F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F80 << 16)},
    **{"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)},
}
"""By dtype: the unsigned integer type of its bits, and the exponent mask, all ones in a value that is not finite."""


def open_tensors(path: Path, framework: Literal["pt", "numpy"] = "pt") -> Any:
    """Open a safetensors file, unless its header is huge: a parsed header takes several times its size in memory.

    Raises:
        CheckpointError: if it is not a safetensors file.
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
    """Check that every value in a checkpoint's files is finite; a diverged run may have saved NaN or Inf.

    `files` names safetensors files whose hashes are verified.

    Raises:
        CheckpointError: naming the first tensor with a value that is not finite.
        ResourceError: if this process cannot read the files now.
    """
    for file in files:
        try:
            name = _first_not_finite(folder / file)
        except OSError as error:
            raise read_error(folder / file, error) from None
        if name is not None:
            raise CheckpointError(f"{folder}: {name} is not finite: the run had diverged when it was saved")


def _first_not_finite(path: Path) -> str | None:
    """Return the name of the first tensor in a file with a value that is not finite; None if there is none."""
    open_tensors(path, "numpy")  # validates the header, and that every tensor lies inside the file
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = sorted((entry["data_offsets"], entry["dtype"], name) for name, entry in header.items())
        for (start, end), dtype, name in entries:
            file.seek(8 + length + start)
            if dtype in _EXPONENT and not _is_finite(file, end - start, dtype):
                return name
    return None


def _is_finite(file: BufferedReader, num_bytes: int, dtype: str) -> bool:
    import numpy as np

    words, exponent = _EXPONENT[dtype]
    block = np.empty(min(num_bytes, _BLOCK_BYTES) // np.dtype(words).itemsize, words)
    is_special = np.empty(block.shape, bool)
    while num_bytes > 0:
        # Buffers are reused: allocating new ones takes longer than the check itself.
        length = file.readinto(block.data.cast("B")[:num_bytes])
        count = length // block.itemsize
        np.bitwise_and(block[:count], exponent, out=block[:count])
        if np.equal(block[:count], exponent, out=is_special[:count]).any():
            return False
        num_bytes -= length or num_bytes  # stop if the file has been truncated meanwhile
    return True
