"""Print what the benchmarks of costs measured as tables, and write it as JSON."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from trainer.console import formatting
from trainer.console.result_tables import result_screen, result_table, write_result
from trainer.console.style import QUIET
from trainer.lab.costs.interleaved import Measured

_LEGEND: Final = {
    "ms": "median time of the counted rounds, in which all entries take turns",
    "[middle half]": "first and third quartile of that time",
    "x ours": "time over that of the first entry of ours with the same input, in the same round: median",
    "x first routing": "time over that of the same entry with the first routing, in the same round: median",
    "x fewest experts": "time over that of the same entry with the first number of experts, in the same round: median",
    "saved B/token": "bytes that stay until the backward pass, parameters left out, by token",
    "x least": "these over X (the layer's input) and H (what enters the activation)",
    "peak MB": "most memory at a time in forward and backward (a step: and the update), beyond what was there before",
    "waits": "times that the host would wait for a GPU, counted on any machine; kernels for the CPU count too",
    "rows B/token": "bytes of rows that a rank sends, forward and backward, by token",
    "x fewest rows": "these over the least: a token travels once to each rank with any of its experts, four times",
    "other B/token": "bytes of everything else that a rank sends",
    "messages": "to one other rank each",
}
_ENTRY: Final = "entry"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEntry:
    """One line of a table: what was measured of one entry, or why nothing was."""

    contender: str
    """Such as `turnout, fused`."""
    routing: str
    num_experts: int
    measured: Measured | None
    error: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is our mixture of experts."""
        return self.contender.startswith("turnout") and "dense" not in self.contender


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCase:
    """Entries that were measured together."""

    title: str
    settings: Mapping[str, Any]
    entries: Sequence[CostEntry]

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"title": self.title, **self.settings, "entries": [self._record(entry) for entry in self.entries]}

    def _record(self, entry: CostEntry) -> dict[str, Any]:
        record = {"contender": entry.contender, "routing": entry.routing, "num_experts": entry.num_experts}
        if entry.measured is None:
            return {**record, "error": entry.error}
        seconds = list(entry.measured.seconds)
        median_s = entry.measured.median_s if seconds else None
        record |= {"seconds": seconds, "median_s": median_s, **entry.measured.facts}
        return {**record, **{name: self.ratio(entry, name) for name in _REFERENCES}}

    def ratio(self, entry: CostEntry, name: str) -> tuple[float, float, float] | None:
        """Return the time over that of the named reference: median and quartiles; None if that is itself."""
        reference = next((other for other in self.entries if _REFERENCES[name](other, entry)), None)
        if reference is None or reference is entry or reference.measured is None or entry.measured is None:
            return None
        return entry.measured.over(reference.measured) if entry.measured.seconds else None


_REFERENCES: Final = {
    "over_ours": lambda o, e: o.is_ours and (o.routing, o.num_experts) == (e.routing, e.num_experts),
    "over_first_routing": lambda o, e: (o.contender, o.num_experts) == (e.contender, e.num_experts),
    "over_fewest_experts": lambda o, e: (o.contender, o.routing) == (e.contender, e.routing),
}
"""For a candidate and an entry: whether the candidate can be its reference; the first that can is."""


def machine_facts(device: str) -> dict[str, Any]:
    """Return what the times depend on besides the code."""
    on_gpu = device == "cuda" and torch.cuda.is_available()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report_costs(
    command: str, cases: Sequence[CostCase], *, options: Mapping[str, Any], device: str, json_path: Path | None
) -> int:
    """Print a table for each case, write all as JSON if wanted, and return the exit code."""
    screen, shown = result_screen(), set()
    for case in cases:
        columns = _columns(case)
        shown |= columns.keys()
        table = result_table(case.title, _ENTRY, *columns)
        several = len({(entry.routing, entry.num_experts) for entry in case.entries}) > 1
        for index, entry in enumerate(case.entries):
            name = f"{entry.contender}; {entry.num_experts} experts, {entry.routing}" if several else entry.contender
            table.add_row(name, *(column[index] for column in columns.values()))
        screen.print(table)
        for entry in case.entries:
            if entry.error is not None:
                screen.print(f"* {entry.contender} is left out: {entry.error}", style=QUIET, soft_wrap=True)
    for column, text in _LEGEND.items():
        if column in shown:
            screen.print(f"{column:17}{text}", style=QUIET, soft_wrap=True)
    if json_path is not None:
        record = {"command": command, "machine": machine_facts(device), "options": options}
        write_result(json_path, {**record, "cases": [case.record() for case in cases]})
    return 0


def _columns(case: CostCase) -> dict[str, list[str]]:
    """Return the columns in which any entry has a value."""
    rows = [_cells(case, entry) for entry in case.entries]
    return {
        name: [row.get(name, formatting.DASH) for row in rows] for name in _LEGEND if any(name in row for row in rows)
    }


def _cells(case: CostCase, entry: CostEntry) -> dict[str, str]:
    """Return the cells of one entry by column."""
    cells: dict[str, str] = {}
    measured = entry.measured
    if measured is None:
        return cells
    if measured.seconds:
        low, high = measured.middle_half
        cells["ms"] = formatting.number(1e3 * measured.median_s, digits=1)
        cells["[middle half]"] = f"[{1e3 * low:.1f} - {1e3 * high:.1f}]"
    for name, column in zip(_REFERENCES, ("x ours", "x first routing", "x fewest experts"), strict=True):
        if (ratio := case.ratio(entry, name)) is not None:
            cells[column] = formatting.ratio(ratio[0])
    facts = measured.facts
    for key, column in (
        ("saved_bytes_per_token", "saved B/token"),
        ("row_bytes_per_token", "rows B/token"),
        ("other_bytes_per_token", "other B/token"),
        ("messages", "messages"),
        ("waits", "waits"),
    ):
        if key in facts:
            cells[column] = formatting.number(facts[key], digits=0)
    if "peak_bytes" in facts:
        cells["peak MB"] = formatting.number(facts["peak_bytes"] / 1e6, digits=1)
    for key, column in (("saved_bytes_per_token", "x least"), ("row_bytes_per_token", "x fewest rows")):
        if least := facts.get(f"least_{key}"):
            cells[column] = formatting.ratio(facts[key] / least)
    return cells
