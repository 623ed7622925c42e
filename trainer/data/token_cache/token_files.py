"""Token files: the training or validation text of one domain on disk.

DOMAIN.train.tokens      ids, little-endian, in the smallest unsigned type that holds the vocabulary
DOMAIN.train.documents   int64 position of each document's first token
DOMAIN.train.answers     int64 position of each document's first learned token; those before it are its prompt
DOMAIN.train.gaps        int64 begin and end of each stretch after an answer's start that is not learned: the questions
                         between the answers of a conversation; only where a document has one
DOMAIN.train.weights     float64 weight of each document in the training loss; absent if all are 1
DOMAIN.train.checksums   of the blocks of a large tokens file (checksums.py); other files are verified when opened

tokens      p0 d0 d0 EOD d1 d1 EOD d2      the end of document belongs to the document before it
documents   0            4         7
answers        1         4         7
gaps                              (7 8 if d2 is a question; an end of document is learned or in a gap, like any token)
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.config.base import Config
from trainer.data.token_cache.checksums import CHECKSUM_BYTES, CheckedArray, damaged, num_blocks
from trainer.data.tokenizers.base import token_dtype

POSITION = np.dtype("<i8")  # type of positions on disk
WEIGHT = np.dtype("<f8")  # type of weights on disk
_SMALL_BYTES = 128 << 10
"""Files up to this size are read into memory: a mapping keeps a file open, and a run may have thousands."""


class TokenFileInfo(Config):
    """Entry of one token file in the manifest."""

    num_tokens: int
    num_bytes: int
    num_documents: int
    sha256: str
    """Hash of the tokens file."""
    documents_sha256: str
    answers_sha256: str
    checksums_sha256: str | None = None
    """Hash of the checksums file; None for a small tokens file, or one from an older version."""
    num_gaps: int = 0
    gaps_sha256: str | None = None
    """Hash of the gaps file; None if there is none."""
    weights_sha256: str | None = None
    """Hash of the weights file; None if there is none."""

    def content(self) -> list[str]:
        """Return the hashes of the content: equal exactly if the content is."""
        optional = [one for one in (self.gaps_sha256, self.weights_sha256) if one is not None]
        return [self.sha256, self.documents_sha256, self.answers_sha256, *optional]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenFile:
    """Training or validation text of one domain, mapped from disk and verified against its hashes."""

    tokens: NDArray[np.unsignedinteger] | CheckedArray  # (num_tokens,), read-only
    document_starts: NDArray[np.int64]  # (num_documents,) position of each document's first token; the first is 0
    answer_starts: NDArray[np.int64]
    """(num_documents,) position of each document's first learned token; its end if none is learned."""
    num_bytes: int  # UTF-8 bytes of text; an end of document has none
    gaps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(2 * num_gaps,) ascending: begin and end of each stretch after an answer's start that is not learned.

    A gap is inside a document, whose end may be in it; that of the last document is at num_tokens.
    """
    weights: NDArray[np.float64] | None = None
    """(num_documents,) weight of each document in the training loss; None: all are 1."""

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
        """Whether any token is not learned; compares all starts."""
        return len(self.gaps) > 0 or not np.array_equal(self.document_starts, self.answer_starts)

    def document_of(self, index: ArrayLike) -> NDArray[np.int64]:
        """Return the number of each token's document; same shape as `index`."""
        return np.searchsorted(self.document_starts, index, side="right") - 1

    def is_learned(self, index: NDArray[np.int64], document: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether each token is a target: part of an answer or the end of its document, but not of a prompt."""
        is_answer = index >= self.answer_starts[document]
        if not len(self.gaps):
            return is_answer
        return is_answer & (np.searchsorted(self.gaps, index, side="right") % 2 == 0)

    def learned_spans(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return begin and end of each learned stretch, ascending; the end of the last document is at num_tokens.

        Every document ends a stretch, even if the next one goes on learning.
        """
        ends = np.append(self.document_starts[1:], self.num_tokens + 1)
        # Stretches and gaps of a document alternate, so that sorting pairs every begin with its end.
        begin = np.sort(np.concatenate([self.answer_starts, self.gaps[1::2]]))
        end = np.sort(np.concatenate([self.gaps[::2], ends]))
        return begin[begin < end], end[begin < end]

    def document(self, index: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]:
        """Return the tokens of a document (n,), and whether each of them and its end is learned (n + 1,)."""
        start, end = int(self.document_starts[index]), self.num_tokens
        if index + 1 < self.num_documents:
            end = int(self.document_starts[index + 1]) - 1
        positions = np.arange(start, end + 1)
        return self.tokens[start:end], self.is_learned(positions, np.full_like(positions, index))

    def weight(self, index: int) -> float:
        """Return the weight of a document in the training loss."""
        return 1.0 if self.weights is None else float(self.weights[index])

    def loss_mask(
        self, index: NDArray[np.int64], document: NDArray[np.int64]
    ) -> NDArray[np.bool_] | NDArray[np.float64]:
        """Return whether each token is a target, or its weight in the loss if the documents have weights."""
        is_learned = self.is_learned(index, document)
        return is_learned if self.weights is None else is_learned * self.weights[document]


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
    """Map a token file into memory, or raise DataError; tokens of large files are verified when they are read."""
    tokens, dtype = folder / f"{name}.tokens", token_dtype(vocab_size)
    if info.checksums_sha256 is None:
        verified = _verified(tokens, dtype, info.sha256)
    else:
        path = folder / f"{name}.checksums"
        checksums = path.read_bytes()
        if hashlib.sha256(checksums).hexdigest() != info.checksums_sha256:
            raise damaged(path)
        verified = CheckedArray(tokens, dtype, checksums)
    gaps, weights = np.zeros(0, dtype=POSITION), None
    if info.gaps_sha256 is not None:
        gaps = _verified(folder / f"{name}.gaps", POSITION, info.gaps_sha256)
    if info.weights_sha256 is not None:
        weights = _verified(folder / f"{name}.weights", WEIGHT, info.weights_sha256)
    return TokenFile(
        tokens=verified,
        document_starts=_verified(folder / f"{name}.documents", POSITION, info.documents_sha256),
        answer_starts=_verified(folder / f"{name}.answers", POSITION, info.answers_sha256),
        num_bytes=info.num_bytes,
        gaps=gaps,
        weights=weights,
    )


def has_checksums(size_bytes: int) -> bool:
    """Return whether a tokens file of this size has a checksums file."""
    return size_bytes > _SMALL_BYTES


def _expected(folder: Path, name: str, info: TokenFileInfo, *, vocab_size: int) -> list[tuple[Path, int, str]]:
    """Return the files of DOMAIN.SIDE with their sizes and hashes."""
    num_tokens_bytes = info.num_tokens * token_dtype(vocab_size).itemsize
    num_positions_bytes = info.num_documents * POSITION.itemsize
    expected = [
        (folder / f"{name}.tokens", num_tokens_bytes, info.sha256),
        (folder / f"{name}.documents", num_positions_bytes, info.documents_sha256),
        (folder / f"{name}.answers", num_positions_bytes, info.answers_sha256),
    ]
    if info.gaps_sha256 is not None:
        expected.append((folder / f"{name}.gaps", 2 * info.num_gaps * POSITION.itemsize, info.gaps_sha256))
    if info.weights_sha256 is not None:
        expected.append((folder / f"{name}.weights", info.num_documents * WEIGHT.itemsize, info.weights_sha256))
    if info.checksums_sha256 is not None:
        size_bytes = num_blocks(num_tokens_bytes) * CHECKSUM_BYTES
        expected.append((folder / f"{name}.checksums", size_bytes, info.checksums_sha256))
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
