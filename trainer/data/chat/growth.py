"""Bounds of what a template's filters and methods make, checked before they make it."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from jinja2.exceptions import TemplateError

MAX_CHARACTERS: Final = 1 << 25
"""Length of a rendered conversation, and of any string on the way to it."""
_WIDENING: Final = frozenset(
    ("ljust", "rjust", "center", "zfill", "expandtabs", "indent", "batch", "slice", "wordwrap", "truncate")
)
"""Filters and methods of strings that fill up to a width."""
_WIDE: Final = re.compile(r"\d{7}")
_WIDTH_IS_GIVEN: Final = re.compile(r"\*|\{[^{}]*\{")  # "%*d", "{:{}}"


class TooLarge(TemplateError):
    """A rendering that exceeds a limit."""


def check_length(length: int) -> None:
    """Raise TooLarge for a string or list that is too long."""
    if length > MAX_CHARACTERS:
        raise TooLarge(f"it makes {length} characters, and {MAX_CHARACTERS} are allowed")


def check_result(value: Any) -> Any:
    """Return a value, or raise TooLarge if it is a string or list that is too long."""
    if isinstance(value, str | list):
        check_length(len(value))
    return value


def bounded_list(values: Iterable[Any]) -> list[Any]:
    """Return values as a list, or raise TooLarge if its strings are too long together."""
    found: list[Any] = []
    length = 0
    for value in values:
        length += len(value) if isinstance(value, str) else 1
        check_length(length)
        found.append(value)
    return found


def check_call(name: str, values: Sequence[Any]) -> None:
    """Raise TooLarge if a filter or a method of strings would make too much of its values, the string among them."""
    if name in _WIDENING:
        _check_widths(values)
    texts = [value for value in values if isinstance(value, str)]
    if name == "replace" and len(texts) == 3:
        text, old, new = texts
        check_length(len(text) + text.count(old) * len(new))
    if name == "join":
        between = max(map(len, texts), default=0)
        for pieces in values:
            if isinstance(pieces, list | tuple):
                check_length(sum(between + (len(piece) if isinstance(piece, str) else 0) for piece in pieces))
    if name == "format" and texts:
        check_format(texts[0], values)


def check_format(form: str, values: Iterable[Any]) -> None:
    """Raise TooLarge for a format of excessive width."""
    if _WIDE.search(form):
        raise TooLarge("it formats a value to a width of more than a million")
    if _WIDTH_IS_GIVEN.search(form):
        _check_widths(values)


def _check_widths(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int):
            check_length(abs(value))
