"""Writer of token files."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.token_cache.checksums import HashedFile
from trainer.data.token_cache.token_files import POSITION, WEIGHT, TokenFile, TokenFileInfo, has_checksums
from trainer.data.tokenizers.base import token_dtype

_CHUNK_TOKENS = 1 << 22
_CHUNK_DOCUMENTS = 1 << 20


class TokenWriter(AbstractContextManager["TokenWriter"]):
    """Writes one token file, document by document; a context manager that closes it."""

    def __init__(self, folder: Path, name: str, *, vocab_size: int, end_of_document: int) -> None:
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._end_of_document = np.array([end_of_document], dtype=self._dtype)
        self.num_tokens = 0
        """Number of tokens so far, including ends of documents."""
        self._num_bytes = self._num_documents = 0
        self._checksums_path = folder / f"{name}.checksums"
        self._gaps_path = folder / f"{name}.gaps"
        self._gaps: HashedFile | None = None  # created by the first gap: most texts have none
        self._num_gaps = 0
        self._weights_path = folder / f"{name}.weights"
        self._weights: HashedFile | None = None  # until a document has another weight than 1
        self._tokens, self._starts, self._answers = (
            HashedFile(folder / f"{name}.{content}") for content in ("tokens", "documents", "answers")
        )

    def write(
        self,
        tokens: NDArray[np.integer],
        *,
        num_bytes: int,
        num_prompt_tokens: int = 0,
        is_learned: NDArray[np.bool_] | None = None,
        weight: float = 1.0,
    ) -> None:
        """Append a document of `num_bytes` bytes of text; its first `num_prompt_tokens` are not learned.

        Instead of those, `is_learned` (n + 1,) can say so of each token and of the end of the document. `weight` is
        that of its targets in the training loss.
        """
        fits_by_type = tokens.dtype == self._dtype and self._vocab_size > np.iinfo(self._dtype).max
        if not fits_by_type and tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise ValueError(f"tokens in [{tokens.min()}, {tokens.max()}] do not fit the vocabulary {self._vocab_size}")
        gaps: Sequence[int] = ()
        if is_learned is not None:
            num_prompt_tokens, gaps = _prompt_and_gaps(is_learned)
        start = self._next_start()
        self._starts.write(start.to_bytes(POSITION.itemsize, "little"))
        self._answers.write((start + num_prompt_tokens).to_bytes(POSITION.itemsize, "little"))
        self._write_gaps(start + np.asarray(gaps, dtype=POSITION))
        self._append(tokens.astype(self._dtype, copy=False))
        self._write_weights(None if weight == 1 else np.array([weight]), count=1)
        self._num_documents += 1
        self._num_bytes += num_bytes

    def extend(self, file: TokenFile) -> None:
        """Append all documents of another token file with the same vocabulary."""
        if file.num_documents == 0:
            return
        start = self._next_start()
        self._starts.write((file.document_starts + start).astype(POSITION).tobytes())
        self._answers.write((file.answer_starts + start).astype(POSITION).tobytes())
        self._write_gaps(file.gaps + start)
        self._write_weights(file.weights, count=file.num_documents)
        for first in range(0, file.num_tokens, _CHUNK_TOKENS):
            self._append(file.tokens[first : first + _CHUNK_TOKENS])
        self._num_documents += file.num_documents
        self._num_bytes += file.num_bytes

    def info(self) -> TokenFileInfo:
        """Return the manifest entry of the file so far."""
        return TokenFileInfo(
            num_tokens=self.num_tokens,
            num_bytes=self._num_bytes,
            num_documents=self._num_documents,
            sha256=self._tokens.sha256(),
            documents_sha256=self._starts.sha256(),
            answers_sha256=self._answers.sha256(),
            checksums_sha256=hashlib.sha256(self._tokens.checksums()).hexdigest() if self._has_checksums() else None,
            num_gaps=self._num_gaps,
            gaps_sha256=self._gaps.sha256() if self._gaps is not None else None,
            weights_sha256=self._weights.sha256() if self._weights is not None else None,
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in (self._tokens, self._starts, self._answers, self._gaps, self._weights):
            if file is not None:
                file.close()
        if kind is None and self._has_checksums():
            self._checksums_path.write_bytes(self._tokens.checksums())

    def _has_checksums(self) -> bool:
        return has_checksums(self.num_tokens * self._dtype.itemsize)

    def _write_weights(self, weights: NDArray[np.float64] | None, *, count: int) -> None:
        """Append the weights of the next `count` documents, before they are counted; None: all are 1."""
        if weights is None and self._weights is None:
            return
        if self._weights is None:
            self._weights = HashedFile(self._weights_path)
            for first in range(0, self._num_documents, _CHUNK_DOCUMENTS):
                self._weights.write(_ones(min(_CHUNK_DOCUMENTS, self._num_documents - first)))
        self._weights.write(_ones(count) if weights is None else weights.astype(WEIGHT).tobytes())

    def _next_start(self) -> int:
        """End the previous document; return the start of the next one."""
        if self._num_documents > 0:
            self._append(self._end_of_document)
        return self.num_tokens

    def _write_gaps(self, gaps: NDArray[np.int64]) -> None:
        if len(gaps):
            self._gaps = self._gaps or HashedFile(self._gaps_path)
            self._gaps.write(gaps.astype(POSITION).tobytes())
            self._num_gaps += len(gaps) // 2

    def _append(self, tokens: NDArray[np.unsignedinteger]) -> None:
        self._tokens.write(tokens.tobytes())
        self.num_tokens += len(tokens)


def _prompt_and_gaps(is_learned: NDArray[np.bool_]) -> tuple[int, list[int]]:
    """Return the tokens before the first learned one, and begin and end of each later stretch that is not learned.

    The last entry of `is_learned` (n + 1,) is the end of the document. If nothing is learned, that end is a gap.
    """
    num_tokens = len(is_learned) - 1
    first = int(is_learned.argmax()) if is_learned.any() else num_tokens
    bounds = np.concatenate([[True], is_learned[first:], [True]])  # what is before and after does not begin a gap
    return first, (first + np.flatnonzero(bounds[1:] != bounds[:-1])).tolist()


def _ones(count: int) -> bytes:
    return np.ones(count, dtype=WEIGHT).tobytes()
