"""Bytes as tokens."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from trainer.data.tokenizers.base import Tokenizer


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte; 0xFF, which UTF-8 never uses, ends a document."""

    vocab_size = 256
    end_of_document = 0xFF
    fingerprint = "byte"

    def encode(self, text: str) -> NDArray[np.uint8]:
        """Return the UTF-8 bytes of `text` as uint8, read-only."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, which need not be whole characters; an end of document gives none.

        Raises:
            ValueError: if an id is not in [0, 256).
        """
        return bytes(token for token in tokens if token != self.end_of_document)

    def token_bytes(self) -> NDArray[np.int64]:
        """Return (256,): 1 for every id but the end of document, which is 0."""
        num_bytes = np.ones(self.vocab_size, dtype=np.int64)
        num_bytes[self.end_of_document] = 0
        return num_bytes
