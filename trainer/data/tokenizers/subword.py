"""Lossless subword tokenizer: a wrapper of the `tokenizers` library."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HfTokenizer

from trainer.data.tokenizers import byte_level
from trainer.data.tokenizers.base import Tokenizer, token_dtype
from trainer.data.tokenizers.hf_files import hf_files
from trainer.data.tokenizers.lossless import UnsuitableTokenizer, flatten_steps

MAX_VOCAB_SIZE = 1 << 24  # largest vocabulary: a stray id in a file must not fill the memory

_PIECE_CHARACTERS = 1 << 17
_PIECES_AT_ONCE = 16
_FEW_CHARACTERS = 16
_BYTES_OF_UTF8 = (*range(0xC0), *range(0xC2, 0xF5))
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class SubwordTokenizer(Tokenizer):
    """A tokenizer.json whose encoding is checked to round-trip byte for byte.

    Texts are encoded in pieces of at most 2^17 characters, which end with a line where possible, to bound memory and to
    use threads. If a piece does not round-trip (one with U+2581, where that stands for a space), the few characters
    responsible are encoded as single bytes.
    """

    def __init__(self, text: str, end_of_document: str) -> None:
        """Load a tokenizer.json that `make_lossless` has returned; `end_of_document` is a special token of it.

        Raises UnsuitableTokenizer if it cannot encode every text, and ValueError if the library refuses the file.
        """
        self._text, self._end_of_document = text, end_of_document
        self.fingerprint = tokenizer_fingerprint(text, end_of_document)
        try:
            self._library = HfTokenizer.from_str(text)
            self._library.encode("\U0010fffd")  # in no vocabulary: fails here if the unknown token is missing
        except Exception as error:  # the library has no class of its own
            raise ValueError(str(error)) from None
        self._library.encode_special_tokens = True  # special tokens in a text are encoded as text
        self._bytes = _bytes_of_ids(self._library, json.loads(text))
        self.vocab_size = len(self._bytes)
        self._dtype = token_dtype(self.vocab_size)
        self._id_of_byte = {token[0]: i for i, token in reversed(list(enumerate(self._bytes))) if len(token) == 1}
        missing = [byte for byte in _BYTES_OF_UTF8 if byte not in self._id_of_byte]
        if missing:
            raise UnsuitableTokenizer(f"it has no token for {len(missing)} bytes, among them 0x{missing[0]:02X}")
        end = self._library.token_to_id(end_of_document)
        assert end is not None, "it is an added token"
        self.end_of_document = end
        self._num_bytes = np.fromiter(map(len, self._bytes), dtype=np.int64, count=self.vocab_size)
        self._num_bytes.flags.writeable = False
        added = self._library.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}

    def __reduce__(self) -> tuple[type["SubwordTokenizer"], tuple[str, str]]:
        return SubwordTokenizer, (self._text, self._end_of_document)

    def encode(self, text: str) -> NDArray[np.integer]:
        """Return the ids of `text`, without an end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return the ids of each text, computed by several threads without the interpreter lock."""
        split = [list(_split(text)) for text in texts]
        ids = self._ids(chain.from_iterable(split))
        return [np.fromiter(chain.from_iterable(islice(ids, len(pieces))), dtype=self._dtype) for pieces in split]

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, which need not be whole characters; special tokens have none."""
        ids = list(tokens)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"tokens in [{min(ids)}, {max(ids)}]; ids are in range [0, {self.vocab_size})")
        return self._concatenated(ids)

    def token_bytes(self) -> NDArray[np.int64]:
        """Return (vocab_size,): bytes of text of each id; 0 for special tokens and unused ids."""
        return self._num_bytes

    def special_tokens(self) -> Mapping[str, int]:
        """Return the ids of the special tokens by name."""
        return self._special

    def files(self) -> Mapping[str, str]:
        """Return `tokenizer.json` and `tokenizer_config.json`."""
        return hf_files(self._text, self._end_of_document)

    def _ids(self, pieces: Iterator[str]) -> Iterator[list[int]]:
        while group := list(islice(pieces, _PIECES_AT_ONCE)):
            encodings = self._library.encode_batch_fast(group, add_special_tokens=False)
            for piece, encoding in zip(group, encodings, strict=True):
                yield self._round_trip(piece, encoding.ids)

    def _round_trip(self, piece: str, ids: list[int]) -> list[int]:
        """Return the ids if they decode to the piece, else those of its halves."""
        content = piece.encode("utf-8")
        if self._concatenated(ids) == content:
            return ids
        if len(piece) <= _FEW_CHARACTERS:
            return [self._id_of_byte[byte] for byte in content]
        middle = len(piece) // 2
        return list(chain.from_iterable(self._ids(iter((piece[:middle], piece[middle:])))))

    def _concatenated(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self._bytes.__getitem__, ids))


def tokenizer_fingerprint(text: str, end_of_document: str) -> str:
    """Return the hash of a tokenizer.json and the name of its end of document."""
    return hashlib.sha256(f"{end_of_document}\0{text}".encode()).hexdigest()


def _split(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        end = text.rfind("\n", limit - _PIECE_CHARACTERS // 2, limit) + 1 or limit
        yield text[start:end]
        start = end
    yield text[start:]


def _bytes_of_ids(library: HfTokenizer, content: Mapping[str, Any]) -> list[bytes]:
    """Return the bytes of each id; none for special tokens and unused ids."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    vocab_size = 1 + max(vocabulary.values(), default=0)
    if vocab_size > MAX_VOCAB_SIZE:
        raise UnsuitableTokenizer(
            f"it has an id {vocab_size - 1} for {len(vocabulary)} tokens, and ids below {MAX_VOCAB_SIZE} are allowed"
        )
    steps = flatten_steps(content["normalizer"], "normalizers")
    steps += flatten_steps(content["pre_tokenizer"], "pretokenizers")
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    marks = {"Metaspace": "replacement", "Replace": "content"}
    space_marks: set[str] = {step[marks[step["type"]]] for step in steps if step["type"] in marks}
    added = library.get_added_tokens_decoder()
    bytes_of = [b""] * vocab_size
    for token, index in vocabulary.items():
        if index in added and added[index].special:
            continue
        if index not in added and is_byte_level:
            bytes_of[index] = byte_level.spelled_bytes(token) or token.encode()
        elif index not in added and (byte := _BYTE_TOKEN.fullmatch(token)):
            bytes_of[index] = bytes.fromhex(byte[1])
        else:  # spelled as text, with marks instead of spaces
            for mark in space_marks:
                token = token.replace(mark, " ")
            bytes_of[index] = token.encode()
    return bytes_of
