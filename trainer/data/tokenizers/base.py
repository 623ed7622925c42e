"""Tokenizer interface."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class Tokenizer(ABC):
    """Converts text to token ids and back. Can be pickled, so that other processes need not read its files."""

    vocab_size: int
    """Ids are in [0, vocab_size)."""
    end_of_document: int
    """Id between two documents; no text encodes to it."""
    fingerprint: str
    """Equal for two tokenizers that give equal ids for every text."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.integer]:
        """Return the ids of `text`, without an end of document.

        `decode` restores the UTF-8 bytes of any text exactly. The dtype is `token_dtype(vocab_size)`.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return the ids of each text; implementations may use several threads.

        Processes that share the cores set TOKENIZERS_PARALLELISM=false.
        """
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, without those of an end of document; raise ValueError if one is out of range.

        Decoding is concatenation: the bytes of a token do not depend on its neighbours.
        """

    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """Return (vocab_size,): number of bytes of text of each id, 0 for an end of document. Read-only."""

    def special_tokens(self) -> Mapping[str, int]:
        """Return the ids of tokens that no text encodes to, by the name that stands for each in a rendered chat."""
        return {}

    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """Return text by file name: a folder from which Hugging Face libraries read a tokenizer with the same ids.

        `tokenizer.json`, and `tokenizer_config.json` with the end of document.
        """


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest little-endian unsigned type that holds ids in [0, vocab_size)."""
    for name in ("u1", "<u2", "<u4"):
        dtype = np.dtype(name)
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    raise ValueError(f"vocab_size {vocab_size} needs more than 32 bits for a token")
