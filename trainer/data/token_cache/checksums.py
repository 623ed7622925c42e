"""Token arrays whose blocks are verified against checksums when they are first read.

DOMAIN.train.tokens       | 64 KiB | 64 KiB | rest |
DOMAIN.train.checksums    | 8 bytes| 8 bytes| 8 bytes |     the first bytes of each block's SHA-256

The manifest holds the hash of the checksums, and is signed itself. So a corpus of any size is verified without an extra
pass: a process hashes each block once, when it first reads from it.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError

BLOCK_BYTES = 1 << 16
"""About the read-ahead of the system for one page of a mapped file, so that a block costs no extra reading."""
CHECKSUM_BYTES = 8


class DamagedCache(DataError):
    """A file of the cache does not have the content that was written."""


class HashedFile:
    """A new file, hashed while it is written: the whole, and each block."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash, self._checksums = hashlib.sha256(), bytearray()
        self._buffer = bytearray()  # documents may be short, and system calls are expensive

    def write(self, content: bytes) -> None:
        """Append content."""
        self._buffer += content
        if len(self._buffer) >= BLOCK_BYTES:
            self._flush(len(self._buffer) // BLOCK_BYTES * BLOCK_BYTES)

    def sha256(self) -> str:
        """Return the hash of the content so far."""
        whole = self._hash.copy()
        whole.update(self._buffer)
        return whole.hexdigest()

    def checksums(self) -> bytes:
        """Return the checksums of the blocks so far."""
        return bytes(self._checksums) + (_checksum(self._buffer) if self._buffer else b"")

    def close(self) -> None:
        """Write the rest and close the file."""
        with self._file:
            self._flush(len(self._buffer))

    def _flush(self, size_bytes: int) -> None:
        """Write the beginning of the buffer: whole blocks, or the end of the file."""
        with memoryview(self._buffer)[:size_bytes] as content:
            self._hash.update(content)
            for start in range(0, size_bytes, BLOCK_BYTES):
                self._checksums += _checksum(content[start : start + BLOCK_BYTES])
            written = 0
            while written < size_bytes:  # the system may write less
                written += self._file.write(content[written:])
        del self._buffer[:size_bytes]


class CheckedArray:
    """A read-only one-dimensional array on the disk, which verifies each block when it is first read.

    Pages that the system drops and reads again later are not verified again.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.unsignedinteger], checksums: bytes) -> None:
        self._path, self._checksums = path, checksums
        # A plain array keeps the mapping alive; indexing np.memmap itself is several times slower.
        self._values: NDArray[np.unsignedinteger] = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
        self._block_len = BLOCK_BYTES // dtype.itemsize
        self._is_unread = np.ones(num_blocks(self._values.nbytes), dtype=np.bool_)
        self._has_unread = True

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: slice | NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
        """Index like a plain array; raise DataError if a block with these entries is damaged."""
        if self._has_unread:
            self._check(self._unread_blocks(index))
        return self._values[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.array(self[:], dtype=dtype, copy=copy)

    def _unread_blocks(self, index: slice | NDArray[np.integer]) -> list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step < 0:
                start, stop = stop + 1, start + 1
            first = start // self._block_len
            blocks = np.arange(first, max(-(-stop // self._block_len), first))
        else:
            blocks = np.asarray(index).reshape(-1) // self._block_len
        return np.unique(blocks[self._is_unread[blocks]]).tolist()

    def _check(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            values = self._values[block * self._block_len : (block + 1) * self._block_len]
            expected = self._checksums[block * CHECKSUM_BYTES : (block + 1) * CHECKSUM_BYTES]
            if _checksum(values.data) != expected:
                first = block * BLOCK_BYTES
                raise damaged(self._path, f"bytes {first} to {first + values.nbytes - 1} are")
            self._is_unread[block] = False
        self._has_unread = bool(self._is_unread.any())


def _checksum(block: bytearray | memoryview) -> bytes:
    return hashlib.sha256(block).digest()[:CHECKSUM_BYTES]


def num_blocks(size_bytes: int) -> int:
    """Return the number of blocks of a file."""
    return -(-size_bytes // BLOCK_BYTES)


def damaged(path: Path, what: str = "its content is") -> DamagedCache:
    """Return the error for a damaged file of the cache."""
    return DamagedCache(
        f"{path}: {what} not what was written (the checksum differs); disk or memory has corrupted it; "
        f"remove {path.parent}, and it is built again from the text"
    )
