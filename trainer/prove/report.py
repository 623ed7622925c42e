"""The proof on the screen and on the disk."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.prove.cases import Case
from trainer.prove.compare import GROUPS, Comparison
from trainer.terminal import print_safe


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One layout's result."""

    case: Case
    comparison: Comparison | None
    """None if it did not run."""
    error: str | None = None

    def is_sound(self, labels: Sequence[str]) -> bool:
        """Tell whether it learns what one process learns, or differs in a way that settings with a label explain."""
        found = self.comparison
        return found is not None and (found.is_equal or (bool(labels) and not found.is_beyond_labels))


class Table:
    """Worst relative errors, a line for each layout as soon as it is there."""

    def __init__(self, cases: Sequence[Case], groups: Collection[str], *, labels: Sequence[str]) -> None:
        """Lay out the columns.

        Args:
            cases: every layout that will come.
            groups: what is compared, some of `GROUPS`.
            labels: settings that are not layout-invariant.
        """
        self._groups = [group for group in GROUPS if group in groups]
        self._width = max((len(case.name) for case in cases), default=0)
        self._labels = labels

    def head(self, title: str, *, tolerance: float) -> None:
        """Print what is above the lines."""
        print_safe(f"{title}\nworst relative error; at most {tolerance:.0e} is equal\n")
        names = "".join(f"{group.removeprefix('gradient: '):>9}" for group in self._groups)
        print_safe(f"{'':{self._width}}{names}{'flips':>7}")

    def line(self, row: TableRow) -> None:
        """Print a layout's result."""
        print_safe(f"{row.case.name:{self._width}}{_cells(row, self._groups)}  {_verdict(row, self._labels)}")

    def foot(self, rows: Sequence[TableRow]) -> None:
        """Print what is wrong with each layout that fails, and why some may."""
        for row in rows:
            if row.error is not None:
                print_safe(f"\n{row.case.name}: {row.error}")
            elif row.comparison is not None and not row.comparison.is_equal:
                first, cause = row.comparison.first_different, row.comparison.cause
                print_safe(f"\n{row.case.name}: first different is {first}\n  {cause}")
        for label in self._labels:
            print_safe(f"\n{label}: not layout-invariant by definition")


def _cells(row: TableRow, groups: Sequence[str]) -> str:
    if row.comparison is None:
        return f"{'-':>9}" * len(groups) + f"{'-':>7}"
    worst = row.comparison.worst
    return "".join(f"{worst.get(group, 0.0):9.0e}" for group in groups) + f"{row.comparison.flips:7}"


def _verdict(row: TableRow, labels: Sequence[str]) -> str:
    if row.comparison is None:
        return "FAILED"
    if row.comparison.is_equal:
        return "equal"
    return "differs, as labelled" if row.is_sound(labels) else "DIFFERS"


def write_json(path: Path, rows: Sequence[TableRow], *, tolerance: float, labels: Sequence[str]) -> None:
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
                "chunks": row.case.chunks,
                "data": row.case.data,
                "engine": row.case.engine,
                "zero_stage": row.case.zero_stage,
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
