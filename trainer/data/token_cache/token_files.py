"""Token files: the training or validation text of one domain on disk.

DOMAIN.train.tokens      ids, little-endian, in the smallest unsigned type that holds the vocabulary
DOMAIN.train.documents   int64 position of each document's first token
DOMAIN.train.answers     int64 position of each document's first learned token; those before it are its prompt
DOMAIN.train.checksums   of the blocks of a large tokens file (checksums.py); other files are verified when opened

tokens      p0 d0 d0 EOD d1 d1 EOD d2      the end of document belongs to the document before it
documents   0            4         7
answers        1         4         7
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.config.base import Config
from trainer.data.token_cache.checksums import (
    CHECKSUM_BYTES,
    BlockChecksums,
    CheckedArray,
    HashedFile,
    damaged,
    num_blocks,
)
from trainer.data.tokenizers.base import token_dtype

_POSITION = np.dtype("<i8")
_CHUNK_TOKENS = 1 << 22
_SMALL_BYTES = 128 << 10
"""Files up to this size are read into memory: a mapping keeps a file open, and a run may have thousands."""


class TokenFileInfo(Config):
    """Entry of one token file in the manifest."""

    num_tokens: int
    """Includes ends of documents."""
    num_bytes: int
    """UTF-8 bytes of text; an end of document has none."""
    num_documents: int
    sha256: str
    """Hash of the tokens file."""
    documents_sha256: str
    answers_sha256: str
    checksums_sha256: str | None = None
    """Hash of the checksums file; None for a small tokens file, or one from an older version."""

    def content(self) -> list[str]:
        """Return the hashes of the content: equal exactly if the content is."""
        return [self.sha256, self.documents_sha256, self.answers_sha256]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenFile:
    """Training or validation text of one domain, mapped from disk and verified against its hashes."""

    tokens: NDArray[np.unsignedinteger] | CheckedArray
    """(num_tokens,), read-only."""
    document_starts: NDArray[np.int64]
    """(num_documents,) position of each document's first token; the first is 0."""
    answer_starts: NDArray[np.int64]
    """(num_documents,) position of each document's first learned token; its end if none is learned."""
    num_bytes: int
    """UTF-8 bytes of text; an end of document has none."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens, including ends of documents."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents, including parts of a divided one."""
        return len(self.document_starts)

    @property
    def has_prompts(self) -> bool:
        """Whether any document has a prompt; compares all starts."""
        return not np.array_equal(self.document_starts, self.answer_starts)

    def document_of(self, index: ArrayLike) -> NDArray[np.int64]:
        """Return the number of each token's document; same shape as `index`."""
        return np.searchsorted(self.document_starts, index, side="right") - 1

    def is_learned(self, index: NDArray[np.int64], document: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether each token is a target: part of an answer or the end of its document, but not of a prompt.

        Args:
            index: positions.
            document: number of each token's document; same shape.
        """
        return index >= self.answer_starts[document]


class TokenWriter:
    """Writes one token file, document by document; a context manager that closes it."""

    def __init__(self, folder: Path, name: str, *, vocab_size: int, end_of_document: int) -> None:
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._end_of_document = np.array([end_of_document], dtype=self._dtype)
        self._num_tokens = self._num_bytes = self._num_documents = 0
        self._checksums_path = _path(folder, name, "checksums")
        self._checksums = BlockChecksums()
        self._tokens = HashedFile(tokens_path(folder, name), self._checksums)
        self._starts, self._answers = (HashedFile(path(folder, name)) for path in (starts_path, answers_path))

    def write(self, tokens: NDArray[np.integer], *, num_bytes: int, num_prompt_tokens: int = 0) -> None:
        """Append a document of `num_bytes` bytes of text; its first `num_prompt_tokens` are not learned.

        Raises:
            ValueError: if a token is outside the vocabulary.
        """
        fits_by_type = tokens.dtype == self._dtype and self._vocab_size > np.iinfo(self._dtype).max
        if not fits_by_type and tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise ValueError(f"tokens in [{tokens.min()}, {tokens.max()}] do not fit the vocabulary {self._vocab_size}")
        start = self._next_start()
        self._starts.write(start.to_bytes(_POSITION.itemsize, "little"))
        self._answers.write((start + num_prompt_tokens).to_bytes(_POSITION.itemsize, "little"))
        self._append(tokens.astype(self._dtype, copy=False))
        self._num_documents += 1
        self._num_bytes += num_bytes

    def extend(self, file: "TokenFile") -> None:
        """Append all documents of another token file with the same vocabulary."""
        if file.num_documents == 0:
            return
        start = self._next_start()
        self._starts.write((file.document_starts + start).astype(_POSITION).tobytes())
        self._answers.write((file.answer_starts + start).astype(_POSITION).tobytes())
        for first in range(0, file.num_tokens, _CHUNK_TOKENS):
            self._append(file.tokens[first : first + _CHUNK_TOKENS])
        self._num_documents += file.num_documents
        self._num_bytes += file.num_bytes

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, including ends of documents."""
        return self._num_tokens

    def info(self) -> TokenFileInfo:
        """Return the manifest entry of the file so far."""
        return TokenFileInfo(
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            num_documents=self._num_documents,
            sha256=self._tokens.sha256(),
            documents_sha256=self._starts.sha256(),
            answers_sha256=self._answers.sha256(),
            checksums_sha256=hashlib.sha256(self._checksums.digest()).hexdigest() if self._is_large() else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self._tokens, self._starts, self._answers):
            file.close()
        if error is None and self._is_large():
            self._checksums_path.write_bytes(self._checksums.digest())

    def _is_large(self) -> bool:
        return self._num_tokens * self._dtype.itemsize > _SMALL_BYTES

    def _next_start(self) -> int:
        """End the previous document; return the start of the next one."""
        if self._num_documents > 0:
            self._append(self._end_of_document)
        return self._num_tokens

    def _append(self, tokens: NDArray[np.unsignedinteger]) -> None:
        self._tokens.write(tokens.tobytes())
        self._num_tokens += len(tokens)


def is_intact(folder: Path, name: str, info: TokenFileInfo, *, vocab_size: int, verify: bool = False) -> bool:
    """Return whether a token file exists in the size of the manifest; `verify` compares its hashes too."""
    try:
        for path, size_bytes, sha256 in _expected(folder, name, info, vocab_size=vocab_size):
            if path.stat().st_size != size_bytes:
                return False
            if verify:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        return False
    except OSError:
        return False
    return True


def open_token_file(folder: Path, name: str, info: TokenFileInfo, *, vocab_size: int) -> TokenFile:
    """Map a token file into memory. Positions are verified now, tokens of large files when they are read.

    Raises:
        DataError: naming the file, if one is damaged.
    """
    tokens, dtype = tokens_path(folder, name), token_dtype(vocab_size)
    if info.checksums_sha256 is None:
        verified = _verified(tokens, dtype, info.sha256)
    else:
        path = _path(folder, name, "checksums")
        checksums = path.read_bytes()
        if hashlib.sha256(checksums).hexdigest() != info.checksums_sha256:
            raise damaged(path)
        verified = CheckedArray(tokens, dtype, checksums)
    return TokenFile(
        tokens=verified,
        document_starts=_verified(starts_path(folder, name), _POSITION, info.documents_sha256),
        answer_starts=_verified(answers_path(folder, name), _POSITION, info.answers_sha256),
        num_bytes=info.num_bytes,
    )


def token_file_paths(folder: Path, name: str, info: TokenFileInfo, *, vocab_size: int) -> list[Path]:
    """Return the files of DOMAIN.SIDE."""
    return [path for path, _, _ in _expected(folder, name, info, vocab_size=vocab_size)]


def tokens_path(folder: Path, name: str) -> Path:
    """Return the path of the tokens of DOMAIN.SIDE."""
    return _path(folder, name, "tokens")


def starts_path(folder: Path, name: str) -> Path:
    """Return the path of the document starts of DOMAIN.SIDE."""
    return _path(folder, name, "documents")


def answers_path(folder: Path, name: str) -> Path:
    """Return the path of the answer starts of DOMAIN.SIDE."""
    return _path(folder, name, "answers")


def _path(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{name}.{kind}"


def _expected(folder: Path, name: str, info: TokenFileInfo, *, vocab_size: int) -> list[tuple[Path, int, str]]:
    """Return the files of DOMAIN.SIDE with their sizes and hashes."""
    num_tokens_bytes = info.num_tokens * token_dtype(vocab_size).itemsize
    num_positions_bytes = info.num_documents * _POSITION.itemsize
    expected = [
        (tokens_path(folder, name), num_tokens_bytes, info.sha256),
        (starts_path(folder, name), num_positions_bytes, info.documents_sha256),
        (answers_path(folder, name), num_positions_bytes, info.answers_sha256),
    ]
    if info.checksums_sha256 is not None:
        size_bytes = num_blocks(num_tokens_bytes) * CHECKSUM_BYTES
        expected.append((_path(folder, name, "checksums"), size_bytes, info.checksums_sha256))
    return expected


def _verified(path: Path, dtype: np.dtype, sha256: str) -> np.ndarray:
    if path.stat().st_size <= _SMALL_BYTES:
        values = np.fromfile(path, dtype=dtype)
        values.flags.writeable = False
    else:
        # A plain array keeps the mapping alive; indexing np.memmap itself is several times slower.
        values = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    if hashlib.sha256(values.data).hexdigest() != sha256:
        raise damaged(path)
    return values
