"""Rows: records with named columns, read part by part."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.records.bad_records import BadRow, usable

_JSON_TYPES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
}

ANOTHER_TYPE = "of another type"
"""Reason why a row cannot be used."""


class Row(NamedTuple):
    """One record."""

    where: str
    """Origin for error messages: path:line, or a data set's name and the number of the row."""
    values: dict[str, Any]
    """Values by column: null, booleans, numbers, strings, lists and dicts of them."""

    def value(self, column: str) -> Any:
        """Return the value of a column; `a.b` is what column `a` has under `b`, where no column has that name.

        Raises:
            BadRow: if there is none.
        """
        if column in self.values:
            return self.values[column]
        value: Any = self.values
        for key in column.split("."):
            if not isinstance(value, dict) or key not in value:
                raise BadRow(
                    f"{self.where}: no column {column!r}; {_has(value, key)}; correct the name or the row",
                    reason="without a column",
                )
            value = value[key]
        return value

    def text(self, column: str) -> str:
        """Return the string in a column.

        Raises:
            BadRow: if there is none.
        """
        value = self.value(column)
        if not isinstance(value, str):
            raise BadRow(
                f"{self.where}: {column!r} is {type_name(value)}; it must be a string; correct or remove the row",
                reason=ANOTHER_TYPE,
            )
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePart:
    """A piece of what is read, which one process reads by itself."""

    size_bytes: int
    """Size of its files, as far as it is known."""


class Rows(ABC):
    """Reads records in a fixed order. A part is a function of the files alone, and parts in order are all rows."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return every local file that is read, in order.

        Raises:
            DataError: if a file is missing or a glob matches none.
        """

    @abstractmethod
    def parts(self) -> Sequence[SourcePart]:
        """Return the parts; at least one.

        Raises:
            DataError: if what is to be read is not there.
        """

    @abstractmethod
    def entries(self, part: SourcePart) -> Iterator[Row | BadRow]:
        """Yield the rows of one of this object's parts, those that cannot be read as what is wrong with them.

        Raises:
            DataError: naming the file, if it cannot be read to its end.
        """

    def read(self, part: SourcePart) -> Iterator[Row]:
        """Yield the rows of one of this object's parts.

        Raises:
            DataError: naming file and row, if one is unreadable.
        """
        return usable(self.entries(part))

    def taken(self) -> list[str]:
        """Return what is taken where a folder does not say it: a line for each."""
        return []

    def origin(self) -> str:
        """Return what is read and is no local file: its addresses and their versions. Empty if all files are local."""
        return ""

    def rows(self) -> Iterator[Row]:
        """Yield all rows.

        Raises:
            DataError: naming file and row, if one is unreadable, or if there are none.
        """
        found = False
        for part in self.parts():
            for row in self.read(part):
                found = True
                yield row
        if not found:
            raise BadRow(f"{self}: holds no rows; it needs some; correct the path")


def type_name(value: Any) -> str:
    """Return what JSON calls the type of a value, with its article."""
    return _JSON_TYPES.get(type(value), "an object")


def _has(value: Any, key: str) -> str:
    if not isinstance(value, dict):
        return f"what should have {key!r} is {type_name(value)}"
    close = difflib.get_close_matches(key, value, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"the row has {', '.join(list(value)[:8]) or 'no columns'}{hint}"
