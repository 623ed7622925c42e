"""Subword units: the vocabulary of a tokenizer.json, byte for byte."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Library

from trainer.data.token_cache.shards import token_dtype
from trainer.data.tokenizers import byte_level
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.exact import Unsuitable, parts_of
from trainer.data.tokenizers.folder import folder_of

MAX_VOCAB_SIZE = 1 << 24
"""Largest vocabulary; a stray id in a file is no reason to fill the memory."""

_PIECE_CHARACTERS = 1 << 17
_PIECES_AT_ONCE = 16
_FEW_CHARACTERS = 16
_BYTES_OF_UTF8 = (*range(0xC0), *range(0xC2, 0xF5))
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class SubwordTokenizer(Tokenizer):
    """Tokenizer of the `tokenizers` library, checked to give back every text.

    A text is cut into pieces of at most 2^17 characters, behind a line where there is one, for memory and threads. Of a
    piece that its ids would not give back exactly (one with U+2581, where that stands for a space), the few characters
    it is about become single bytes.
    """

    def __init__(self, text: str, end_of_document: str) -> None:
        """Read a tokenizer.

        Args:
            text: of a tokenizer.json that `made_exact` has been over.
            end_of_document: the special token that stands between documents.

        Raises:
            Unsuitable: if it cannot write every text.
            ValueError: if it is no tokenizer.
        """
        self._text, self._end_of_document = text, end_of_document
        self.fingerprint = fingerprint_of(text, end_of_document)
        try:
            self._library = Library.from_str(text)
            self._library.encode("\U0010fffd")  # what no vocabulary has: an unknown token may be an error
        except Exception as error:  # it has no class of its own
            raise ValueError(str(error)) from None
        self._library.encode_special_tokens = True  # as text: what a document says ends no document
        self._bytes = _bytes_of_ids(self._library, json.loads(text))
        self.vocab_size = len(self._bytes)
        self._dtype = token_dtype(self.vocab_size)
        self._id_of_byte = {token[0]: i for i, token in reversed(list(enumerate(self._bytes))) if len(token) == 1}
        missing = [byte for byte in _BYTES_OF_UTF8 if byte not in self._id_of_byte]
        if missing:
            raise Unsuitable(f"it has no token for {len(missing)} bytes, among them 0x{missing[0]:02X}")
        end = self._library.token_to_id(end_of_document)
        assert end is not None, "it is an added token"
        self.end_of_document = end
        self._num_bytes = np.fromiter(map(len, self._bytes), dtype=np.int64, count=self.vocab_size)
        self._num_bytes.flags.writeable = False

    def __reduce__(self) -> tuple[type["SubwordTokenizer"], tuple[str, str]]:
        return SubwordTokenizer, (self._text, self._end_of_document)

    def encode(self, text: str) -> NDArray[np.integer]:
        """Return the ids of `text`, without an end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return the ids of each text; without the interpreter's lock, by several threads."""
        cuts = [list(_cut(text)) for text in texts]
        ids = self._ids(chain.from_iterable(cuts))
        return [np.fromiter(chain.from_iterable(islice(ids, len(pieces))), dtype=self._dtype) for pieces in cuts]

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, which need not be whole characters; special tokens give none.

        Raises:
            ValueError: if an id is not in [0, vocab_size).
        """
        ids = list(tokens)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"tokens in [{min(ids)}, {max(ids)}]; ids are in range [0, {self.vocab_size})")
        return self._joined(ids)

    def token_bytes(self) -> NDArray[np.int64]:
        """Return (vocab_size,): how many bytes of text each id stands for; 0 for special tokens and ids not in use."""
        return self._num_bytes

    def files(self) -> Mapping[str, str]:
        """Return `tokenizer.json` and `tokenizer_config.json`."""
        return folder_of(self._text, self._end_of_document)

    def _ids(self, pieces: Iterator[str]) -> Iterator[list[int]]:
        """Yield the ids of each piece."""
        while group := list(islice(pieces, _PIECES_AT_ONCE)):
            encodings = self._library.encode_batch_fast(group, add_special_tokens=False)
            for piece, encoding in zip(group, encodings, strict=True):
                yield self._checked(piece, encoding.ids)

    def _checked(self, piece: str, ids: list[int]) -> list[int]:
        """Return the ids if they give the piece back, else those of its halves."""
        content = piece.encode("utf-8")
        if self._joined(ids) == content:
            return ids
        if len(piece) <= _FEW_CHARACTERS:
            return [self._id_of_byte[byte] for byte in content]
        middle = len(piece) // 2
        return list(chain.from_iterable(self._ids(iter((piece[:middle], piece[middle:])))))

    def _joined(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self._bytes.__getitem__, ids))


def fingerprint_of(text: str, end_of_document: str) -> str:
    """Return the hash of a tokenizer.json and of the name of its end of document."""
    return hashlib.sha256(f"{end_of_document}\0{text}".encode()).hexdigest()


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        most = start + _PIECE_CHARACTERS
        end = text.rfind("\n", most - _PIECE_CHARACTERS // 2, most) + 1 or most
        yield text[start:end]
        start = end
    yield text[start:]


def _bytes_of_ids(library: Library, content: Mapping[str, Any]) -> list[bytes]:
    """Return what each id stands for; nothing for special tokens and for ids that are not in use.

    Raises:
        Unsuitable: if an id is out of all proportion.
    """
    vocabulary = library.get_vocab(with_added_tokens=True)
    vocab_size = 1 + max(vocabulary.values(), default=0)
    if vocab_size > MAX_VOCAB_SIZE:
        raise Unsuitable(
            f"it has an id {vocab_size - 1} for {len(vocabulary)} tokens, and ids below {MAX_VOCAB_SIZE} are allowed"
        )
    cutting = [*parts_of(content["normalizer"], "normalizers"), *parts_of(content["pre_tokenizer"], "pretokenizers")]
    is_byte_level = any(part["type"] == "ByteLevel" for part in cutting)
    marks: set[str] = {
        part["replacement" if part["type"] == "Metaspace" else "content"]
        for part in cutting
        if part["type"] in ("Metaspace", "Replace")
    }
    added = library.get_added_tokens_decoder()
    found = [b""] * vocab_size
    for token, index in vocabulary.items():
        if index in added:
            is_special = added[index].special
            found[index] = b"" if is_special else _spelled(token, marks)
        elif is_byte_level:
            found[index] = byte_level.bytes_of(token) or token.encode()
        elif byte := _BYTE_TOKEN.fullmatch(token):
            found[index] = bytes.fromhex(byte[1])
        else:
            found[index] = _spelled(token, marks)
    return found


def _spelled(token: str, marks: Iterable[str]) -> bytes:
    """Return the bytes of a token that is written as it is, but for the mark that stands for a space."""
    for mark in marks:
        token = token.replace(mark, " ")
    return token.encode()
