"""Texts with columns in them.

"{en} = {de}"              strings; a value of another type is an error, never a guess
"{translation.en}"         what column `translation` has under `en`
"{stars:d}" "{price:g}"    whole numbers; numbers
"{label:bad|good}"         the first, second, ... text, for the numbers 0, 1, ... (or false and true)
"{{" "}}"                  braces
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator

from trainer.config.nodes import shown
from trainer.data.records.bad_records import BadRow
from trainer.data.records.base import ANOTHER_TYPE, Row, type_name

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_template(text: str) -> str:
    """Return a template as it is.

    Raises:
        ValueError: if it has a brace without its partner, or a column without a name.
    """
    for token in _TOKEN.finditer(text):
        if token[0] in "{}":
            raise ValueError(f"has {token[0]!r} without its partner; write {token[0] * 2} for a brace")
        column, has_format, format_ = (token[1] or "").partition(":")
        if token[1] is not None and not column:
            raise ValueError("has {} without the name of a column; write {text}, or {{}} for braces")
        if has_format and format_ not in ("d", "g") and "|" not in format_:
            raise ValueError(
                f"has {shown(token[0])[1:-1]}; after a colon come d (a whole number), g (a number) or no|yes (choices)"
            )
    return text


TemplateText = Annotated[str, AfterValidator(check_template)]
"""A template, checked when the config is read."""


class Template:
    """Renders rows."""

    def __init__(self, text: str) -> None:
        """Take a template that `check_template` accepts."""
        self._pieces: list[str | tuple[str, str]] = []  # text, or a column and its format
        end = 0
        for token in _TOKEN.finditer(text):
            self._pieces.append(text[end : token.start()])
            end = token.end()
            if token[1] is None:
                self._pieces.append(token[0][0])
            else:
                column, _, format_ = token[1].partition(":")
                self._pieces.append((column, format_))
        self._pieces.append(text[end:])
        self._pieces = [piece for piece in self._pieces if piece]

    @property
    def columns(self) -> list[str]:
        """Columns that are read, in order."""
        return [piece[0] for piece in self._pieces if isinstance(piece, tuple)]

    def render(self, row: Row) -> str:
        """Return the text for a row.

        Raises:
            BadRow: naming row and column, if a value is missing, of another type or not valid Unicode.
        """
        return "".join(piece if isinstance(piece, str) else _format(row, *piece) for piece in self._pieces)


def _format(row: Row, column: str, format_: str) -> str:
    if not format_:
        return check_unicode(row.text(column), column, where=row.where)
    value = row.value(column)
    if format_ == "d":
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise _wrong(row, column, value, "a whole number")
    if format_ == "g":
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _shortest(value)
        raise _wrong(row, column, value, "a number")
    choices = format_.split("|")
    if isinstance(value, int) and 0 <= value < len(choices):
        return choices[value]
    raise _wrong(row, column, value, f"a whole number from 0 to {len(choices) - 1}")


def _shortest(value: float) -> str:
    """Return a number as people write it, and no other number: 19 for 19.0, 978300760 as it is."""
    text = f"{value:g}"
    return text if isinstance(value, float) and float(text) == value else str(value)


def check_unicode(text: str, column: str, *, where: str) -> str:
    """Return a text as it is.

    Raises:
        BadRow: if it has half of a surrogate pair, which JSON can escape and no encoding of text can hold.
    """
    if not text.isascii() and (half := _SURROGATE.search(text)):
        raise BadRow(
            f"{where}: {column!r} has the lone surrogate \\u{ord(half[0]):04x} at character {half.start()}; text must "
            "be valid Unicode; correct or remove the row",
            reason="not Unicode",
        )
    return text


def _wrong(row: Row, column: str, value: Any, needed: str) -> BadRow:
    shown = value if isinstance(value, int | float) else type_name(value)
    return BadRow(
        f"{row.where}: {column!r} is {shown}; it must be {needed}; correct or remove the row", reason=ANOTHER_TYPE
    )
