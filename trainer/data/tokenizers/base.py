"""Tokenizer interface."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class Tokenizer(ABC):
    """Text to token ids and back. Can be pickled, so that other processes need not read its files."""

    vocab_size: int
    """Ids are in [0, vocab_size)."""
    end_of_document: int
    """Id that stands between two documents. No text gives it, whatever it says."""
    fingerprint: str
    """Equal for two tokenizers that give equal ids for every text."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.integer]:
        """Return the ids of `text`, without an end of document.

        `decode` gives exactly the UTF-8 bytes of the text back, whatever characters it has. The dtype is the smallest
        unsigned one that holds the vocabulary.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return what `encode` gives for each text, where that is possible in less time, by several threads.

        Processes that already share the cores set TOKENIZERS_PARALLELISM=false.
        """
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`; an end of document gives none.

        Decoding is concatenation: no token needs its neighbours.

        Raises:
            ValueError: if an id is not in [0, vocab_size).
        """

    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """Return (vocab_size,): how many bytes of text each id stands for, 0 for an end of document. Read-only."""

    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """Return a folder, text by file name, from which Hugging Face's libraries read a tokenizer of the same ids.

        `tokenizer.json`, and `tokenizer_config.json` that names the end of document.
        """
