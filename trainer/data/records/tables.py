"""Records of Arrow tables, converted one by one where the table has unusable ones, and the CSV lines pandas skips."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.data.records import json_lines
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import Record

_SKIPPED_LINE = re.compile(r"line (\d+): (.+)")
"""Warning of pandas about a skipped CSV line."""
_TOO_MANY_FIELDS = re.compile(r"Expected \d+ fields in line \d+, saw \d+")
_MAX_REASON_CHARACTERS = 300
TOO_MANY_FIELDS = "of too many fields"
"""`BadRecord.reason` of a CSV line."""


def to_record(values: dict[str, Any] | Exception, place: str) -> Record | BadRecord:
    """Return a record, or its error if the library could not convert it or it is too large."""
    if isinstance(values, Exception):
        return BadRecord(
            f"{place}: cannot be read ({first_line_of(values)}); correct or remove the record",
            reason="that cannot be read",
        )
    return json_lines.too_large(place) if _is_too_large(values) else Record(place, values)


def first_line_of(error: BaseException) -> str:
    """Return the first line of an error message, truncated."""
    lines = str(error).strip().splitlines()
    return lines[0][:_MAX_REASON_CHARACTERS] if lines else ""


def has_too_many_fields(reason: str) -> bool:
    """Return whether pandas refused a CSV file because of a line with too many fields."""
    return _TOO_MANY_FIELDS.search(reason) is not None


def table_values(table: Any) -> list[dict[str, Any] | Exception]:
    """Return the values of each record of a table, with an exception in place of each that cannot be converted."""
    converted = _try_convert(table)
    if not isinstance(converted, Exception):
        return [*converted]
    rows = (_try_convert(table.slice(i, 1)) for i in range(table.num_rows))
    return [row if isinstance(row, Exception) else row[0] for row in rows]


def _try_convert(table: Any) -> list[dict[str, Any]] | Exception:
    try:
        return table.to_pylist()
    except MemoryError:
        raise
    except Exception as error:
        return error


def _is_too_large(values: dict[str, Any]) -> bool:
    num_characters = sum(len(value) for value in values.values() if isinstance(value, str | bytes))
    if 4 * num_characters <= json_lines.MAX_RECORD_BYTES:
        return False
    num_bytes = sum(len(value.encode("utf-8", "surrogatepass")) for value in values.values() if isinstance(value, str))
    return num_bytes > json_lines.MAX_RECORD_BYTES


@contextmanager
def collect_skipped_lines(name: str) -> Iterator[list[BadRecord]]:
    """Collect the lines with too many fields that pandas skips in a CSV file inside the block."""
    skipped: list[BadRecord] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield skipped
    for warning in caught:
        for number, reason in _SKIPPED_LINE.findall(str(warning.message)):
            skipped.append(BadRecord(f"{name}:{number}: {reason}; correct or remove the line", reason=TOO_MANY_FIELDS))
