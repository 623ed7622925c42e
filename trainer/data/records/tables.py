"""Tables of a library as rows: what cannot be read or is too large row by row, and what the library leaves out."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.data.records import jsonl
from trainer.data.records.bad_records import BadRow
from trainer.data.records.base import Row

_BAD_LINE = re.compile(r"line (\d+): (.+)")
"""Warning of pandas about a line of a csv."""
_TOO_LONG_LINE = re.compile(r"Expected \d+ fields in line \d+, saw \d+")
_MAX_REASON = 300
TOO_MANY_FIELDS = "of too many fields"
"""Reason why a line of a csv cannot be used."""


def row_of(values: dict[str, Any] | Exception, place: str) -> Row | BadRow:
    """Return a row, or what is wrong with it."""
    if isinstance(values, Exception):
        reason = "that cannot be read"
        return BadRow(f"{place}: cannot be read ({one_line(values)}); correct or remove the row", reason=reason)
    return jsonl.too_large(place) if _is_too_large(values) else Row(place, values)


def one_line(error: BaseException) -> str:
    """Return the first line of what an error says, cut to what a message holds."""
    lines = str(error).strip().splitlines()
    return lines[0][:_MAX_REASON] if lines else ""


def has_too_many_fields(reason: str) -> bool:
    """Tell whether the library refuses a csv for one of its lines."""
    return _TOO_LONG_LINE.search(reason) is not None


def values_in(table: Any) -> list[dict[str, Any] | Exception]:
    """Return the rows of a table; where one cannot be read, one by one."""
    try:
        return table.to_pylist()
    except MemoryError:
        raise
    except Exception:
        return [_row(table.slice(i, 1)) for i in range(table.num_rows)]


def _row(table: Any) -> dict[str, Any] | Exception:
    try:
        return table.to_pylist()[0]
    except MemoryError:
        raise
    except Exception as error:
        return error


def _is_too_large(values: dict[str, Any]) -> bool:
    num_characters = sum(len(value) for value in values.values() if isinstance(value, str | bytes))
    if 4 * num_characters <= jsonl.MAX_ROW_BYTES:
        return False
    return (
        sum(len(value.encode("utf-8", "surrogatepass")) for value in values.values() if isinstance(value, str))
        > jsonl.MAX_ROW_BYTES
    )


@contextmanager
def lines_left_out(name: str) -> Iterator[list[BadRow]]:
    """Gather the lines that the library leaves out of a csv in a block, because they have too many fields."""
    found: list[BadRow] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield found
    for warning in said:
        for number, reason in _BAD_LINE.findall(str(warning.message)):
            found.append(BadRow(f"{name}:{number}: {reason}; correct or remove the line", reason=TOO_MANY_FIELDS))
