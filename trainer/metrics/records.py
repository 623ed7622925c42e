"""Lines of metrics.jsonl and routing.jsonl as what they are: text that anybody may have written or damaged."""

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_LONGEST_BYTES = 16 << 20  # of a line; a record of a thousand layers of a thousand experts has less
_MOST = 1 << 53


def lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Yield lines with their ends; one that is longer than any of ours comes in pieces, of which none is a record."""
    with path.open("rb") as file:
        file.seek(start)
        while line := file.readline(_LONGEST_BYTES):
            yield line


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also a line that is not UTF-8, or is nested deeply
        return None
    return record if isinstance(record, dict) else None


def is_kept(line: bytes, step: int) -> bool:
    """Tell whether a line is a whole record, and not of a step after this one."""
    record = parse(line)
    if record is None or not line.endswith(b"\n"):
        return False
    recorded = record.get("step")
    return not isinstance(recorded, int | float) or recorded <= step


def loss_curve(path: Path) -> tuple[Sequence[int], Sequence[float]]:
    """Return step and loss of every training record, NaN where it is null; other lines are passed over.

    Raises:
        OSError: if the file cannot be read.
    """
    steps, losses = array("q"), array("d")
    for line in lines(path):
        record = parse(line) or {}
        step, loss = record.get("step"), record.get("loss", "")
        is_number = type(loss) is float or (type(loss) is int and abs(loss) <= _MOST)
        if type(step) is int and 0 <= step <= _MOST and (loss is None or is_number):
            steps.append(step)
            losses.append(math.nan if loss is None else loss)
    return steps, losses
