r"""Text of tokens for readers: whole characters of UTF-8, whatever the tokenizer, and control characters as escapes."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.data.tokenizers.base import Tokenizer

_END = b"(end of document)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Text around a token of a row; see `report_data.Excerpt`."""

    before: str
    token: str
    after: str


class TokenText:
    """Bytes of tokens by id, and passages of text made of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._known = tokenizer, {i: n.encode() for n, i in tokenizer.special_tokens().items()}
        self._known.setdefault(tokenizer.end_of_document, _END)
        self._special = frozenset(self._known)

    def is_special(self, token: int) -> bool:
        """Return whether a token stands for no text, as the end of a document."""
        return token in self._special

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, those of a special one being its name."""
        if token not in self._known:
            self._known[token] = self._tokenizer.decode([token])
        return self._known[token]

    def of(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; parts of characters at its ends stay, as escapes."""
        return escaped_text(self._bytes(tokens))

    def beginning(self, tokens: Sequence[int], *, most_bytes: int) -> str:
        """Return the first bytes of a row, cut between characters."""
        return escaped_text(whole_end(whole_start(self._bytes(tokens[:most_bytes]))[:most_bytes]))

    def around(self, tokens: Sequence[int], index: int, *, most_bytes: int) -> Passage:
        """Return a token of a row with at most so many bytes before and after it.

        A token that is a part of a character is shown with all of it.
        """
        reach = most_bytes + 3  # of which 3 may be the rest of the token's character
        before = self._bytes(tokens[max(0, index - reach) : index])
        token = self._bytes(tokens[index : index + 1])
        after = self._bytes(tokens[index + 1 : index + 1 + reach])
        start = _begun(before) if _starts_inside(token) else 0
        if start:
            before, token = before[:-start], before[-start:] + token
        missing = _missing(token)
        if missing and len(after) >= missing and all(_is_continuation(byte) for byte in after[:missing]):
            token, after = token + after[:missing], after[missing:]
        return Passage(
            before=escaped_text(whole_start(before[-most_bytes:] if most_bytes else b"")),
            token=escaped_text(token),
            after=escaped_text(whole_end(after[:most_bytes])),
        )

    def _bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.bytes_of(int(token)) for token in tokens)


def escaped_text(text: bytes) -> str:
    r"""Decode UTF-8; bytes that are none, and characters that cannot be seen, become escapes such as \xff and \n."""
    return "".join(_shown(character) for character in text.decode("utf-8", errors="backslashreplace"))


def whole_start(text: bytes) -> bytes:
    """Remove the rest of a character whose beginning is missing."""
    start = 0
    while start < min(3, len(text)) and _is_continuation(text[start]):
        start += 1
    return text[start:]


def whole_end(text: bytes) -> bytes:
    """Remove the beginning of a character whose rest is missing."""
    return text[: -_begun(text)] if _missing(text) else text


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _starts_inside(token: bytes) -> bool:
    return bool(token) and _is_continuation(token[0])


def _begun(text: bytes) -> int:
    """Return how many of the last bytes are the beginning of a character; 0 if it is complete or there is none."""
    for length in range(1, min(3, len(text)) + 1):
        lead = text[-length]
        if not _is_continuation(lead):
            return length if _width(lead) > length else 0
    return 0


def _missing(text: bytes) -> int:
    """Return how many bytes the last character misses."""
    length = _begun(text)
    return _width(text[-length]) - length if length else 0


def _width(lead: int) -> int:
    """Return the bytes of a character by its first byte; 1 for a byte that begins none."""
    return 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 1
