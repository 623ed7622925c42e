"""Validation splits: pure functions of the text, so that every run and machine holds out the same.

`hash` sends whole documents to a side by the SHA-256 of their text: equal texts are on the same side, and a document
stays where it is when others come or go. `tail` joins the texts of a domain and holds out the end:

    documents   [ a ][   b   ][  c  ]        characters 0..n
    tail cut    [ a ][  b |  b ][  c ]       at int(n * (1 - fraction))
    train       a EOD b                      validation   b EOD c

An end of document (EOD) stands between two documents of one side, that is, after each but the last: the cut adds none,
and a domain of one document has none at all.
"""

import hashlib
from fractions import Fraction
from typing import Literal, NamedTuple

from trainer.data.config import SplitConfig

Side = Literal["train", "validation"]


class Piece(NamedTuple):
    """A document, or what the cut leaves of one, and the side it is on."""

    side: Side
    text: str
    """Text to learn."""
    prompt: str = ""
    """Prompt, read before the text and not learned."""


def is_held_out(text: str, fraction: float) -> bool:
    """Return whether `hash` holds this document out, which it does to `fraction` of all texts."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64  # exact: Python compares int and float by value


def tail_cut(num_characters: int, fraction: float) -> int:
    """Return how many of a domain's characters come before the tail: int(n * (1 - fraction)), computed exactly.

    The fraction is taken as it is written: 0.9 holds out 9 of 10 characters, though 1 - 0.9 is less than 0.1 in binary.
    """
    return int(num_characters * (1 - Fraction(repr(fraction))))


class DomainSplit:
    """Splits one domain's documents, given one after another; holds at most one of them."""

    def __init__(self, config: SplitConfig, *, num_characters: int | None = None) -> None:
        """Start a domain; `num_characters` is the length of all its texts, which only kind `tail` needs."""
        if config.kind == "tail" and num_characters is None:
            raise ValueError("kind tail needs num_characters, the length of the domain's text")
        self.kind = config.kind
        """Becomes `hash` or `tail` when `auto` is decided: by the second document, or the end of the domain."""
        self._fraction = config.fraction
        self._waiting: tuple[str, str] | None = None
        self._cut = tail_cut(num_characters, config.fraction) if num_characters is not None else 0
        self._num_seen = 0

    def add(self, text: str, *, prompt: str = "") -> list[Piece]:
        """Take the next document; return the pieces that are certain now."""
        document = prompt, text
        if self.kind == "tail":
            return self._cut_tail(*document)
        if self.kind == "hash":
            return [self._hashed(*document)]
        if self._waiting is None:
            self._waiting = document
            return []
        first, self._waiting, self.kind = self._waiting, None, "hash"
        return [self._hashed(*first), self._hashed(*document)]

    def finish(self) -> list[Piece]:
        """Return the pieces that waited for the end of the domain."""
        if self._waiting is None:
            return []
        (prompt, text), self._waiting, self.kind = self._waiting, None, "tail"
        self._cut = tail_cut(len(prompt) + len(text), self._fraction)
        return self._cut_tail(prompt, text)

    def _hashed(self, prompt: str, text: str) -> Piece:
        return Piece("validation" if is_held_out(prompt + text, self._fraction) else "train", text, prompt)

    def _cut_tail(self, prompt: str, text: str) -> list[Piece]:
        before = max(self._cut - self._num_seen, 0)
        self._num_seen += len(prompt) + len(text)
        in_text = max(before - len(prompt), 0)
        pieces = [
            Piece("train", text[:in_text], prompt[:before]),
            Piece("validation", text[in_text:], prompt[before:]),
        ]
        return [piece for piece in pieces if piece.prompt or piece.text]
