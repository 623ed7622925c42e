"""Templates that render records to text.

"{en} = {de}"              strings; a value of another type is an error, never converted
"{translation.en}"         key `en` of column `translation`
"{stars:d}" "{price:g}"    whole numbers; numbers
"{label:bad|good}"         the first, second, ... text, for the numbers 0, 1, ... (or false and true)
"{{" "}}"                  braces
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator

from trainer.config.nodes import shown
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import WRONG_TYPE, Record, type_name

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_template(text: str) -> str:
    """Return a template unchanged, or raise ValueError for an unmatched brace, a missing name or an unknown format."""
    for token in _TOKEN.finditer(text):
        if token[0] in "{}":
            raise ValueError(f"has an unmatched {token[0]!r}; write {token[0] * 2} for a brace")
        column, has_format, format_ = (token[1] or "").partition(":")
        if token[1] is not None and not column:
            raise ValueError("has {} without a column name; write {text}, or {{}} for braces")
        if has_format and format_ not in ("d", "g") and "|" not in format_:
            choices = "after the colon, use d (a whole number), g (a number) or no|yes (choices)"
            raise ValueError(f"has {shown(token[0])[1:-1]}; {choices}")
    return text


TemplateText = Annotated[str, AfterValidator(check_template)]
"""A template, checked when the config is read."""


class Template:
    """A parsed template."""

    def __init__(self, text: str) -> None:
        """Parse a template that `check_template` accepts."""
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
        """Columns of the template, in order."""
        return [piece[0] for piece in self._pieces if isinstance(piece, tuple)]

    def render(self, record: Record) -> str:
        """Return the text of a record; raise BadRecord if a value is missing, of another type or not valid Unicode."""
        return "".join(piece if isinstance(piece, str) else _format(record, *piece) for piece in self._pieces)


def _format(record: Record, column: str, format_: str) -> str:
    if not format_:
        return check_unicode(record.text(column), column, where=record.where)
    value = record.value(column)
    if format_ == "d":
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise _wrong_type(record, column, value, "a whole number")
    if format_ == "g":
        if isinstance(value, int | float) and not isinstance(value, bool):
            text = f"{value:g}"  # 19 for 19.0, but 978300760 is not rounded
            return text if isinstance(value, float) and float(text) == value else str(value)
        raise _wrong_type(record, column, value, "a number")
    choices = format_.split("|")
    if isinstance(value, int) and 0 <= value < len(choices):
        return choices[value]
    raise _wrong_type(record, column, value, f"a whole number from 0 to {len(choices) - 1}")


def check_unicode(text: str, column: str, *, where: str) -> str:
    """Return text unchanged, or raise BadRecord for a lone surrogate, which JSON can escape but UTF-8 cannot encode."""
    if not text.isascii() and (half := _SURROGATE.search(text)):
        raise BadRecord(
            f"{where}: {column!r} has the lone surrogate \\u{ord(half[0]):04x} at character {half.start()}; text must "
            "be valid Unicode; correct or remove the record",
            reason="not Unicode",
        )
    return text


def _wrong_type(record: Record, column: str, value: Any, needed: str) -> BadRecord:
    found = value if isinstance(value, int | float) else type_name(value)
    message = f"{record.where}: {column!r} is {found}; it must be {needed}; correct or remove the record"
    return BadRecord(message, reason=WRONG_TYPE)
