"""What a tokenizer is."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int
    """Ids are in [0, vocab_size)."""
    end_of_document: int
    """Id that stands between two documents."""
    fingerprint: str
    """Equal for two tokenizers that give equal ids for every text."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.integer]:
        """Return the ids of `text`, without an end of document.

        The dtype is the smallest unsigned one that holds the vocabulary.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`; an end of document gives none.

        Decoding is concatenation: no token needs its neighbours.
        """

    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """Return (vocab_size,): how many bytes of text each id stands for, 0 for an end of document."""
