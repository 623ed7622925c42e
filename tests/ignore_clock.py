"""Of a line of metrics.jsonl, what no two runs have in common."""

from collections.abc import Mapping
from typing import Any

_CLOCK = ("tokens_per_s", "step_s", "mfu")
_PREFIXES = ("time/", "time_max/", "system/")


def without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without times and what the machine was like: what a run must repeat."""
    return {key: v for key, v in record.items() if key not in _CLOCK and not key.startswith(_PREFIXES)}
