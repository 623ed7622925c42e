"""Print untrusted text on a terminal without its control characters. Imports no torch."""

import contextlib
import io
import logging
import sys
import unicodedata
from typing import Final, TextIO

# Characters that reorder the surrounding text: a sample could otherwise rewrite its own line.
_BIDI_CONTROLS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HIDDEN: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, surrogates and line separators."""
_MAX_LENGTH: Final = 500  # most characters of a one-line message


def visible(text: str) -> str:
    """Replace characters that would move the cursor, colour the screen or reorder the line; keep newlines and tabs.

    A half-trained model generates escape bytes as readily as letters, and a terminal would obey them.
    """
    return text if text.isascii() and text.isprintable() else "".join(_visible(c) for c in text)


def single_line(text: str) -> str:
    """Return text as one line of a message, shortened and without control characters."""
    line = " ".join(visible(text).split())
    return line if len(line) <= _MAX_LENGTH else f"{line[: _MAX_LENGTH - 3]}..."


def print_safe(text: object, *, file: TextIO | None = None) -> None:
    """Print text that may contain untrusted parts."""
    print(visible(str(text)), file=file or sys.stdout, flush=True)


def print_error(text: object) -> None:
    """Print a message on stderr, if the terminal is still there."""
    with contextlib.suppress(OSError):
        print_safe(text, file=sys.stderr)


def show_anything() -> None:
    """Escape the characters of later output that the encoding of the terminal, or of a pipe, does not have."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show_logs() -> None:
    """Filter log records, which name files, like all other output."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Visible())


class _Visible(logging.Formatter):
    """Formats a record as one safe line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record."""
        return single_line(super().format(record))


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if character in _BIDI_CONTROLS or unicodedata.category(character) in _HIDDEN:
        return "\ufffd"
    return character
