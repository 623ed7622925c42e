"""Drop times and machine statistics from a line of metrics.jsonl."""

from collections.abc import Mapping
from typing import Any

_CLOCK = ("tokens_per_s", "step_s", "mfu", "slowest_rank", "slowest_rank_ratio")
_PREFIXES = ("time/", "time_max/", "system/")


def without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record that a repeated run must reproduce."""
    return {key: v for key, v in record.items() if key not in _CLOCK and not key.startswith(_PREFIXES)}
