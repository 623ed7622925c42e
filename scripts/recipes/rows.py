"""Rows and splits that the small data sets have in common."""

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Files = Mapping[str, Sequence[Row] | Sequence[str]]
"""By file name: rows, or lines of text."""


def split(
    rng: random.Random, make: Callable[[random.Random], Row], key: Callable[[Row], Hashable], *, train: int, test: int
) -> dict[str, list[Row]]:
    """Make rows that differ in their key, and part them."""
    rows: dict[Hashable, Row] = {}
    while len(rows) < train + test:
        row = make(rng)
        rows.setdefault(key(row), row)
    made = list(rows.values())
    return {"train.jsonl": made[:train], "test.jsonl": made[train:]}
