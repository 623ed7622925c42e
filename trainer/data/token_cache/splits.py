"""Validation splits: pure functions of the text, so that all runs and machines hold out the same.

`hash` assigns whole documents to a side by the SHA-256 of their text: equal texts are on the same side, and a document
keeps its side when others are added or removed. `tail` concatenates the texts of a domain and holds out the end:

    documents   [ a ][   b   ][  c  ]        characters 0..n
    tail        [ a ][  b |  b ][  c ]       split at int(n * (1 - fraction))
    train       a EOD b                      validation   b EOD c

An end of document (EOD) follows each document of a side but the last: splitting a document adds none, and a domain of
one document has none at all. A conversation is never divided: `tail` holds out the one that the boundary is in.
"""

import hashlib
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from trainer.config.base import Config
from trainer.data.sources.base import Document

Side = Literal["train", "validation"]


class SplitConfig(Config):
    """Validation split, made in each domain separately."""

    kind: Literal["auto", "hash", "tail"] = "auto"
    """`hash`: whole documents, by the hash of their text. `tail`: the end of the domain's text.

    `auto`: `tail` for a domain of one document, else `hash`. If the hash leaves a side empty, the documents of the one
    text whose hash is nearest to that side are moved there.
    """
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction that is held out."""


class Piece(NamedTuple):
    """A document or a part of one, and its side of the split."""

    side: Side
    document: Document


def is_held_out(text: str, fraction: float) -> bool:
    """Return whether `hash` holds a document out, as it does a `fraction` of all texts."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64  # exact: Python compares int and float by value


def side_by_hash(document: Document, fraction: float) -> Side:
    """Return the side of a document by the hash of its whole text."""
    return "validation" if is_held_out(document.prompt + document.text, fraction) else "train"


def tail_start(num_characters: int, fraction: float) -> int:
    """Return the number of a domain's characters before the tail: int(n * (1 - fraction)), computed exactly.

    The fraction is taken in decimal: 0.9 holds out 9 of 10 characters, although 1 - 0.9 is less than 0.1 in binary.
    """
    return int(num_characters * (1 - Fraction(repr(fraction))))


class DomainSplit:
    """Splits the documents of one domain as they arrive; buffers at most one of them."""

    def __init__(self, config: SplitConfig, *, num_characters: int | None = None) -> None:
        """Start a domain; kind `tail` requires the number of characters of all its texts."""
        if config.kind == "tail" and num_characters is None:
            raise ValueError("kind tail needs num_characters, the length of the domain's text")
        self.kind = config.kind
        """`auto` becomes `hash` at the second document or `tail` at the end of the domain."""
        self._fraction = config.fraction
        self._buffered: Document | None = None
        self._tail_start = tail_start(num_characters, config.fraction) if num_characters is not None else 0
        self._num_seen = 0

    def add(self, document: Document) -> list[Piece]:
        """Add a document; return the pieces whose side is known now."""
        if self.kind == "tail":
            return self._split_at_tail(document)
        if self.kind == "hash":
            return [self._by_hash(document)]
        if self._buffered is None:
            self._buffered = document
            return []
        first, self._buffered, self.kind = self._buffered, None, "hash"
        return [self._by_hash(first), self._by_hash(document)]

    def finish(self) -> list[Piece]:
        """End the domain; return the remaining pieces."""
        if self._buffered is None:
            return []
        document, self._buffered = self._buffered, None
        if document.is_whole:
            self.kind = "hash"
            return [self._by_hash(document)]
        self.kind, self._tail_start = "tail", tail_start(document.num_characters, self._fraction)
        return self._split_at_tail(document)

    def _by_hash(self, document: Document) -> Piece:
        return Piece(side_by_hash(document, self._fraction), document)

    def _split_at_tail(self, document: Document) -> list[Piece]:
        before = max(self._tail_start - self._num_seen, 0)
        self._num_seen += document.num_characters
        if document.is_whole:
            return [Piece("train" if document.num_characters <= before else "validation", document)]
        prompt, text = document.prompt, document.text
        in_text = max(before - len(prompt), 0)
        pieces = [
            Piece("train", replace(document, text=text[:in_text], prompt=prompt[:before])),
            Piece("validation", replace(document, text=text[in_text:], prompt=prompt[before:])),
        ]
        return [piece for piece in pieces if piece.document.num_characters]
