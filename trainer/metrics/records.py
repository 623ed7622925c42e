"""Read metrics.jsonl and routing.jsonl, whose lines may be damaged or written by others."""

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_MAX_LINE_BYTES = 16 << 20  # more than a record of a thousand layers with a thousand experts
_MAX_INT = 1 << 53


def read_lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Yield lines with their newlines, from byte `start`; a longer line than any of ours comes in pieces."""
    with path.open("rb") as file:
        file.seek(start)
        while line := file.readline(_MAX_LINE_BYTES):
            yield line


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Parse a line; return None if it is not a JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # including invalid UTF-8 and deep nesting
        return None
    return record if isinstance(record, dict) else None


def is_kept(line: bytes, step: int) -> bool:
    """Return whether a line is a complete record of a step up to `step`."""
    record = parse_record(line)
    if record is None or not line.endswith(b"\n"):
        return False
    record_step = record.get("step")
    return not isinstance(record_step, int | float) or record_step <= step


def loss_curve(path: Path) -> tuple[Sequence[int], Sequence[float]]:
    """Return step and loss of every training record, NaN for null; other lines are skipped.

    Raises:
        OSError: if the file cannot be read.
    """
    steps, losses = array("q"), array("d")
    for line in read_lines(path):
        record = parse_record(line) or {}
        step, loss = record.get("step"), record.get("loss", "")
        is_number = type(loss) is float or (type(loss) is int and abs(loss) <= _MAX_INT)
        if type(step) is int and 0 <= step <= _MAX_INT and (loss is None or is_number):
            steps.append(step)
            losses.append(math.nan if loss is None else loss)
    return steps, losses
