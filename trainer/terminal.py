"""Print foreign text on a terminal without obeying its control characters. Imports no torch."""

import logging
import sys
import unicodedata
from typing import Final, TextIO

# Characters that reorder their surroundings: a sample could otherwise rewrite the line it is shown on.
_BIDI_CONTROLS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HIDDEN: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Categories of control characters, halves of pairs, and what some readers break a line at."""
_LONGEST: Final = 500
"""Characters of a line about what somebody typed."""


def visible(text: str) -> str:
    """Replace characters that would move the cursor, colour the screen or reorder the line; keep newlines and tabs.

    A half-trained model writes escape bytes as readily as letters, and a terminal obeys them.
    """
    return text if text.isascii() and text.isprintable() else "".join(_visible(c) for c in text)


def single_line(text: str) -> str:
    """Return text as a line of a message: nothing in it steers a terminal, breaks the line or floods the screen."""
    line = " ".join(visible(text).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def print_safe(text: object, *, file: TextIO | None = None) -> None:
    """Print lines that may repeat what others wrote."""
    print(visible(str(text)), file=file or sys.stdout, flush=True)


def show_logs() -> None:
    """Let what the program logs, which names files, reach a terminal as everything else does."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Visible())


class _Visible(logging.Formatter):
    """Formats a record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return its message."""
        return single_line(super().format(record))


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if character in _BIDI_CONTROLS or unicodedata.category(character) in _HIDDEN:
        return "\ufffd"
    return character
