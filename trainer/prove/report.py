"""The proof on the screen and on the disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.prove.cases import Case
from trainer.prove.compare import GROUPS, Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One layout's result."""

    case: Case
    comparison: Comparison | None
    """None if it did not run."""
    error: str | None = None


def show(rows: Sequence[Row], *, title: str, tolerance: float, labels: Sequence[str]) -> None:
    """Print worst relative errors, a line for each layout, and what is wrong with each one that fails."""
    groups = [g for g in GROUPS if any(row.comparison and g in row.comparison.worst for row in rows)]
    width = max(len(row.case.name) for row in rows) if rows else 0
    print(title)
    print(f"worst relative error; at most {tolerance:.0e} is equal\n")
    head = "".join(f"{group.removeprefix('gradient: '):>9}" for group in groups)
    print(f"{'':{width}}{head}{'flips':>7}")
    for row in rows:
        print(f"{row.case.name:{width}}{_cells(row, groups)}  {_verdict(row, labels)}")
    for row in rows:
        if row.error is not None:
            print(f"\n{row.case.name}: {row.error}")
        elif row.comparison is not None and not row.comparison.is_equal:
            print(f"\n{row.case.name}: first different is {row.comparison.first_different}\n  {row.comparison.cause}")
    for label in labels:
        print(f"\n{label}: not layout-invariant by definition")


def _cells(row: Row, groups: Sequence[str]) -> str:
    if row.comparison is None:
        return f"{'-':>9}" * len(groups) + f"{'-':>7}"
    worst = row.comparison.worst
    return "".join(f"{worst.get(group, 0.0):9.0e}" for group in groups) + f"{row.comparison.flips:7}"


def _verdict(row: Row, labels: Sequence[str]) -> str:
    if row.comparison is None:
        return "FAILED"
    if row.comparison.is_equal:
        return "equal"
    return "differs, as labelled" if labels else "DIFFERS"


def write_json(path: Path, rows: Sequence[Row], *, tolerance: float, labels: Sequence[str]) -> None:
    """Write everything the table says, for programs."""
    record = {
        "tolerance": tolerance,
        "not_invariant": list(labels),
        "layouts": [
            {
                "name": row.case.name,
                "world_size": row.case.world_size,
                "ep_size": row.case.ep_size,
                "dispatcher": row.case.dispatcher,
                "micro_batch_size": row.case.micro_batch_size,
                "equal": row.comparison is not None and row.comparison.is_equal,
                "worst": {} if row.comparison is None else row.comparison.worst,
                "flips": None if row.comparison is None else row.comparison.flips,
                "first_different": None if row.comparison is None else row.comparison.first_different,
                "cause": row.error if row.comparison is None else row.comparison.cause,
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
