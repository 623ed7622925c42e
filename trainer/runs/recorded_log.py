"""Read a log of a run, metrics.jsonl or routing.jsonl, whose lines may be damaged or written just now."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trainer.atomic_io import NotRegular
from trainer.metrics.records import parse_record, read_lines

_MAX_STEP: Final = 1 << 53
_MAX_VALUE: Final = 1e150  # of which squares and sums are finite; a larger one is damage


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedLog:
    """Records of a log in their order, and the lines that are none."""

    records: Sequence[dict[str, Any]] = ()
    damaged: Sequence[int] = ()
    """Numbers of the damaged lines, from 1."""
    unreadable: str | None = None
    """Why the file cannot be read; None if it was, or does not exist."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and the values of one metric, without records that do not have it; NaN for null."""
        steps, values = list[int](), list[float]()
        for record in self.records:
            if key in record and (record[key] is None or finite(record, key) is not None):
                steps.append(record["step"])
                values.append(math.nan if record[key] is None else float(record[key]))
        return steps, values

    def newest(self, key: str) -> float | None:
        """Return the last finite value of a metric; None if there is none."""
        return next((found for record in reversed(self.records) if (found := finite(record, key)) is not None), None)

    @property
    def last_step(self) -> int:
        """Highest step of a record; 0 without one."""
        return max((record["step"] for record in self.records), default=0)


def read_log(path: Path) -> RecordedLog:
    """Read a log; one that does not exist is empty, and a last line without newline is still being written."""
    records, damaged = list[dict[str, Any]](), list[int]()
    try:
        if not path.is_file():
            raise NotRegular if path.exists() else FileNotFoundError
        for number, line in enumerate(read_lines(path), 1):
            if not line.endswith(b"\n"):
                continue
            record = parse_record(line)
            if record is None or not _is_step(record.get("step")):
                damaged.append(number)
            else:
                records.append(record)
    except FileNotFoundError:
        pass
    except OSError as error:
        return RecordedLog(records=records, damaged=damaged, unreadable=error.strerror or "is not a regular file")
    return RecordedLog(records=records, damaged=damaged)


def finite(record: Mapping[str, Any], key: str) -> float | None:
    """Return the value of a metric if it is a finite number to reckon with, else None."""
    value = record.get(key)
    if type(value) is int:
        return float(value) if abs(value) <= _MAX_STEP else None  # a larger one is none of ours, and may have no float
    return value if type(value) is float and abs(value) <= _MAX_VALUE else None


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_STEP
