"""Tokenizer of UTF-8 bytes."""

import json
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.byte_level import ALPHABET
from trainer.data.tokenizers.hf_files import END_OF_DOCUMENT, hf_files

_CHAT_MARKERS: Final = ("system", "user", "assistant", "tool", "tools", "call", "end")
_SPECIAL: Final = {f"<|{name}|>": 0xF8 + number for number, name in enumerate(_CHAT_MARKERS)} | {END_OF_DOCUMENT: 0xFF}
"""Id by name: none of these bytes is in any UTF-8 text, so that no message can forge a marker."""
_FIRST_SPECIAL: Final = 0xF8


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte; 0xF8 to 0xFE, which UTF-8 never uses, mark turns of a chat, 0xFF ends a document."""

    vocab_size = 256
    end_of_document = 0xFF
    fingerprint = "byte"

    def encode(self, text: str) -> NDArray[np.uint8]:
        """Return the UTF-8 bytes of `text` as uint8, read-only."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, which need not be whole characters, without ends of documents and markers."""
        return bytes(token for token in tokens if token < _FIRST_SPECIAL or token > self.end_of_document)

    def token_bytes(self) -> NDArray[np.int64]:
        """Return (256,): 1 for every id, but 0 for the end of document and markers."""
        num_bytes = np.ones(self.vocab_size, dtype=np.int64)
        num_bytes[_FIRST_SPECIAL:] = 0
        num_bytes.flags.writeable = False
        return num_bytes

    def special_tokens(self) -> Mapping[str, int]:
        """Return the markers of chats and the end of document."""
        return _SPECIAL

    def files(self) -> Mapping[str, str]:
        """Return a byte-level BPE without merges, which gives the same ids."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocabulary = {character: byte for byte, character in enumerate(ALPHABET) if byte < _FIRST_SPECIAL}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content = {
            "version": "1.0",
            "added_tokens": [{"id": byte, "content": name, "special": True} | flags for name, byte in _SPECIAL.items()],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }
        return hf_files(json.dumps(content, ensure_ascii=False, indent=1), END_OF_DOCUMENT)
