"""Tokenizer of UTF-8 bytes."""

import json
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.byte_level import ALPHABET
from trainer.data.tokenizers.hf_files import END_OF_DOCUMENT, hf_files


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte; 0xFF, which UTF-8 never uses, ends a document."""

    vocab_size = 256
    end_of_document = 0xFF
    fingerprint = "byte"

    def encode(self, text: str) -> NDArray[np.uint8]:
        """Return the UTF-8 bytes of `text` as uint8, read-only."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, which need not be whole characters, without ends of documents."""
        return bytes(token for token in tokens if token != self.end_of_document)

    def token_bytes(self) -> NDArray[np.int64]:
        """Return (256,): 1 for every id, but 0 for the end of document."""
        num_bytes = np.ones(self.vocab_size, dtype=np.int64)
        num_bytes[self.end_of_document] = 0
        num_bytes.flags.writeable = False
        return num_bytes

    def files(self) -> Mapping[str, str]:
        """Return a byte-level BPE without merges, which gives the same ids."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocabulary = {character: byte for byte, character in enumerate(ALPHABET) if byte != self.end_of_document}
        end = {"id": self.end_of_document, "content": END_OF_DOCUMENT, "special": True, "normalized": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        content = {
            "version": "1.0",
            "added_tokens": [end | flags],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }
        return hf_files(json.dumps(content, ensure_ascii=False, indent=1), END_OF_DOCUMENT)
