"""Tokens that are compared with checksums as they are read, block by block, and only where they are read.

DOMAIN.train.tokens       | 64 KiB | 64 KiB | rest |
DOMAIN.train.checksums    | 8 bytes| 8 bytes| 8 bytes |     the beginning of each block's SHA-256

The hash of the checksums is in the manifest, and the manifest has its own. So a corpus of any size is compared without
being read twice: a process hashes each block once, when it first reads from it.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError

BLOCK_BYTES = 1 << 16
"""About what the system reads ahead for one page of a mapped file: a block costs no further reading."""
CHECKSUM_BYTES = 8
_BUFFER_BYTES = 1 << 16


class Damaged(DataError):
    """A file of the cache is not what was written."""


class BlockChecksums:
    """The checksums of a file that is being written."""

    def __init__(self) -> None:
        self._done = bytearray()
        self._block, self._room = hashlib.sha256(), BLOCK_BYTES

    def update(self, content: memoryview) -> None:
        """Add what is appended to the file."""
        while len(content):
            piece = content[: self._room]
            self._block.update(piece)
            self._room -= len(piece)
            content = content[len(piece) :]
            if self._room == 0:
                self._done += self._block.digest()[:CHECKSUM_BYTES]
                self._block, self._room = hashlib.sha256(), BLOCK_BYTES

    def digest(self) -> bytes:
        """Return the checksums of the file so far."""
        is_begun = self._room < BLOCK_BYTES
        return bytes(self._done) + (self._block.digest()[:CHECKSUM_BYTES] if is_begun else b"")


class HashedFile:
    """A new file, hashed from memory while it is written."""

    def __init__(self, path: Path, checksums: BlockChecksums | None = None) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash, self._checksums = hashlib.sha256(), checksums
        self._waiting = bytearray()  # documents may be short, and every call costs

    def write(self, content: bytes) -> None:
        """Append."""
        self._waiting += content
        if len(self._waiting) >= _BUFFER_BYTES:
            self._flush()

    def sha256(self) -> str:
        """Return the hash of what was written so far."""
        self._flush()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file."""
        with self._file:
            self._flush()

    def _flush(self) -> None:
        self._hash.update(self._waiting)
        with memoryview(self._waiting) as content:
            if self._checksums is not None:
                self._checksums.update(content)
            written = 0
            while written < len(content):  # the system may take less than all
                written += self._file.write(content[written:])
        self._waiting.clear()


class CheckedArray:
    """An array on the disk, one-dimensional and read-only, of which no block is given out that is not what was written.

    A block is compared once: what the system reads again later, because memory was short, is not.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.unsignedinteger], checksums: bytes) -> None:
        """Map a file.

        Args:
            path: of the file.
            dtype: of its entries.
            checksums: of its blocks, which are taken for what they should be.
        """
        self._path, self._checksums = path, checksums
        # As a plain array, which keeps the mapping alive: indexing a np.memmap costs several times as much.
        self._values: NDArray[np.unsignedinteger] = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
        self._block_len = BLOCK_BYTES // dtype.itemsize
        self._is_unread = np.ones(num_blocks(self._values.nbytes), dtype=np.bool_)
        self._has_unread = True

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: slice | NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
        """Return entries, as of a plain array.

        Raises:
            DataError: if a block that they are in is damaged.
        """
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
            stated = self._checksums[block * CHECKSUM_BYTES : (block + 1) * CHECKSUM_BYTES]
            if hashlib.sha256(values.data).digest()[:CHECKSUM_BYTES] != stated:
                first = block * BLOCK_BYTES
                raise damaged(self._path, f"bytes {first} to {first + values.nbytes - 1} are")
            self._is_unread[block] = False
        self._has_unread = bool(self._is_unread.any())


def num_blocks(size_bytes: int) -> int:
    """Return how many blocks a file has."""
    return -(-size_bytes // BLOCK_BYTES)


def damaged(path: Path, what: str = "its content is") -> Damaged:
    """Return the error for a file of the cache that is not what was written."""
    return Damaged(
        f"{path}: {what} not what was written (the checksum differs); a disk or memory has changed it; remove "
        f"{path.parent}, and it is made again from the text"
    )
