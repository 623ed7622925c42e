"""Token files: one domain's training or validation text as it lies on disk.

DOMAIN.train.tokens      ids, little-endian, in the smallest unsigned type that holds the vocabulary
DOMAIN.train.documents   int64 position of each document's first token

tokens      d0 d0 d0 EOD d1 d1 EOD d2      the end of document belongs to the document before it
documents   0            4         7
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.config.base import Config

_POSITION = np.dtype("<i8")


class ShardInfo(Config):
    """What the manifest knows of one token file."""

    num_tokens: int
    """Ends of documents included."""
    num_bytes: int
    """UTF-8 bytes of text; an end of document has none."""
    num_documents: int
    sha256: str
    """Of the tokens file."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenFile:
    """The tokens of one domain's training or validation text, mapped from disk."""

    tokens: NDArray[np.unsignedinteger]
    """(num_tokens,), read-only."""
    document_starts: NDArray[np.int64]
    """(num_documents,) position of each document's first token; the first is 0."""
    num_bytes: int
    """UTF-8 bytes of text; an end of document has none."""

    @property
    def num_tokens(self) -> int:
        """Tokens, ends of documents included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents, pieces of a cut one included."""
        return len(self.document_starts)

    def document_of(self, index: ArrayLike) -> NDArray[np.int64]:
        """Return the running number of the document that each token belongs to; same shape as `index`."""
        return np.searchsorted(self.document_starts, index, side="right") - 1


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest little-endian unsigned type that holds ids in [0, vocab_size)."""
    for name in ("u1", "<u2", "<u4"):
        dtype = np.dtype(name)
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    raise ValueError(f"vocab_size {vocab_size} needs more than 32 bits for a token")


class TokenWriter:
    """Writes one token file, document by document; a context manager that closes and syncs it."""

    def __init__(self, folder: Path, name: str, *, vocab_size: int, end_of_document: int) -> None:
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._end_of_document = np.array([end_of_document], dtype=self._dtype)
        self._hash = hashlib.sha256()
        self._num_tokens = self._num_bytes = self._num_documents = 0
        self._tokens = tokens_path(folder, name).open("xb")
        self._starts = starts_path(folder, name).open("xb")

    def write(self, tokens: NDArray[np.integer], *, num_bytes: int) -> None:
        """Append a document of `num_bytes` bytes of text.

        Raises:
            ValueError: if a token is outside the vocabulary.
        """
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise ValueError(f"tokens in [{tokens.min()}, {tokens.max()}] do not fit the vocabulary {self._vocab_size}")
        if self._num_documents > 0:
            self._append(self._end_of_document)
        self._starts.write(np.array([self._num_tokens], dtype=_POSITION).tobytes())
        self._append(tokens.astype(self._dtype, copy=False))
        self._num_documents += 1
        self._num_bytes += num_bytes

    def info(self) -> ShardInfo:
        """Return what was written so far."""
        return ShardInfo(
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            num_documents=self._num_documents,
            sha256=self._hash.hexdigest(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self._tokens, self._starts):
            _close(file, sync=error is None)

    def _append(self, tokens: NDArray[np.unsignedinteger]) -> None:
        content = tokens.tobytes()
        self._tokens.write(content)
        self._hash.update(content)
        self._num_tokens += len(tokens)


def is_intact(folder: Path, name: str, info: ShardInfo, *, vocab_size: int, verify: bool = False) -> bool:
    """Return whether a token file is there in the size that the manifest knows; `verify` reads and hashes it too."""
    expected = {
        tokens_path(folder, name): info.num_tokens * token_dtype(vocab_size).itemsize,
        starts_path(folder, name): info.num_documents * _POSITION.itemsize,
    }
    try:
        if any(path.stat().st_size != size_bytes for path, size_bytes in expected.items()):
            return False
        if not verify:
            return True
        with tokens_path(folder, name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == info.sha256
    except OSError:
        return False


def open_token_file(folder: Path, name: str, info: ShardInfo, *, vocab_size: int) -> TokenFile:
    """Map a token file into memory."""
    return TokenFile(
        tokens=_mapped(tokens_path(folder, name), token_dtype(vocab_size)),
        document_starts=_mapped(starts_path(folder, name), _POSITION),
        num_bytes=info.num_bytes,
    )


def tokens_path(folder: Path, name: str) -> Path:
    """Return where the tokens of DOMAIN.SIDE are."""
    return folder / f"{name}.tokens"


def starts_path(folder: Path, name: str) -> Path:
    """Return where the document starts of DOMAIN.SIDE are."""
    return folder / f"{name}.documents"


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    # As a plain array, which keeps the mapping alive: indexing a np.memmap costs several times as much.
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _close(file: BinaryIO, *, sync: bool) -> None:
    with file:
        if sync:
            file.flush()
            os.fsync(file.fileno())
