"""Print the results of a proof as a table, and write them as JSON."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.prove.cases import Case
from trainer.prove.compare import GROUPS, Comparison
from trainer.terminal import print_safe


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """Result of one layout."""

    case: Case
    comparison: Comparison | None
    """None if the layout failed to run."""
    error: str | None = None

    def is_accepted(self, labels: Sequence[str]) -> bool:
        """Return whether the layout equals one process, or differs only as far as labelled settings allow."""
        result = self.comparison
        return result is not None and (result.is_equal or (bool(labels) and not result.is_beyond_labels))


class Table:
    """Table of worst relative errors, with one line per layout, printed as the results arrive."""

    def __init__(self, cases: Sequence[Case], groups: Collection[str], *, labels: Sequence[str]) -> None:
        """Lay out the columns: one for each of `GROUPS` that the config has."""
        self._groups = [group for group in GROUPS if group in groups]
        self._width = max((len(case.name) for case in cases), default=0)
        self._labels = labels

    def head(self, title: str, *, tolerance: float) -> None:
        """Print title and column names."""
        print_safe(f"{title}\nlargest relative error of each group; up to {tolerance:.0e} counts as equal\n")
        names = "".join(f"{group.removeprefix('gradient: '):>9}" for group in self._groups)
        print_safe(f"{'':{self._width}}{names}{'flips':>7}")

    def line(self, row: TableRow) -> None:
        """Print the result of a layout."""
        verdict, cells = "FAILED", f"{'-':>9}" * len(self._groups) + f"{'-':>7}"
        if (result := row.comparison) is not None:
            differs = "differs, as labelled" if row.is_accepted(self._labels) else "DIFFERS"
            verdict = "equal" if result.is_equal else differs
            cells = "".join(f"{result.worst.get(group, 0.0):9.0e}" for group in self._groups) + f"{result.flips:7}"
        print_safe(f"{row.case.name:{self._width}}{cells}  {verdict}")

    def foot(self, rows: Sequence[TableRow]) -> None:
        """Print the cause of each difference, and the labelled settings."""
        for row in rows:
            if row.error is not None:
                print_safe(f"\n{row.case.name}: {row.error}")
            elif row.comparison is not None and not row.comparison.is_equal:
                first, cause = row.comparison.first_different, row.comparison.cause
                print_safe(f"\n{row.case.name}: first difference: {first}\n  {cause}")
        for label in self._labels:
            print_safe(f"\n{label}: not layout-invariant by definition")


def write_json(path: Path, rows: Sequence[TableRow], *, tolerance: float, labels: Sequence[str]) -> None:
    """Write the results as JSON."""
    record = {
        "tolerance": tolerance,
        "not_invariant": list(labels),
        "layouts": [
            {
                "name": row.case.name,
                "engine": row.case.engine,
                **asdict(row.case),
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
