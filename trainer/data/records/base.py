"""Records with named columns, and the interface of their readers."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.records.bad_records import BadRecord, raise_on_bad

_JSON_TYPES = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}

WRONG_TYPE = "of another type"  # `BadRecord.reason` of a value of the wrong type


class Record(NamedTuple):
    """One entry of a data set."""

    where: str  # place for error messages: path:line, or the name of a data set and the record's number
    values: dict[str, Any]  # values by column: null, booleans, numbers, strings, and lists and dicts of them

    def value(self, column: str) -> Any:
        """Return the value of a column, or raise BadRecord; `a.b` is key `b` of `a`, unless a column has that name."""
        if column in self.values:
            return self.values[column]
        value: Any = self.values
        for key in column.split("."):
            if not isinstance(value, dict) or key not in value:
                found = _describe_parent(value, key)
                message = f"{self.where}: no column {column!r}; {found}; correct the name or the record"
                raise BadRecord(message, reason="without a column")
            value = value[key]
        return value

    def text(self, column: str) -> str:
        """Return the string in a column; raise BadRecord if there is no such column or it is no string."""
        value = self.value(column)
        if not isinstance(value, str):
            found = type_name(value)
            message = f"{self.where}: {column!r} is {found}; it must be a string; correct or remove the record"
            raise BadRecord(message, reason=WRONG_TYPE)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePart:
    """A piece of a source that one process can read on its own."""

    size_bytes: int  # size of its files; 0 where unknown


class RecordReader(ABC):
    """Reads records in a fixed order, in parts that depend on the files alone; in order they are all records."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return every local file that is read, in order; raise DataError if one is missing or a glob matches none."""

    @abstractmethod
    def parts(self) -> Sequence[SourcePart]:
        """Return at least one part, or raise DataError if the data is missing."""

    @abstractmethod
    def entries(self, part: SourcePart) -> Iterator[Record | BadRecord]:
        """Yield the records of one of this reader's parts, with a `BadRecord` in place of each unusable one.

        Raises DataError naming the file, if it cannot be read to its end.
        """

    def folder_notes(self) -> list[str]:
        """Return a line for each folder: which of its files are read and which are not."""
        return []

    def origin(self) -> str:
        """Return the addresses and versions of remote files; empty if all files are local."""
        return ""

    def records(self) -> Iterator[Record]:
        """Yield all records; raise DataError at the first unusable one, or if there are none."""
        found = False
        for part in self.parts():
            for record in raise_on_bad(self.entries(part)):
                found = True
                yield record
        if not found:
            raise BadRecord(f"{self}: holds no records; it needs some; correct the path")


def type_name(value: Any) -> str:
    """Return the JSON type of a value, with its article."""
    return "null" if value is None else _JSON_TYPES.get(type(value), "an object")


def _describe_parent(value: Any, key: str) -> str:
    if not isinstance(value, dict):
        return f"the parent of {key!r} is {type_name(value)}"
    close = difflib.get_close_matches(key, value, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"the record has {', '.join(list(value)[:8]) or 'no columns'}{hint}"
