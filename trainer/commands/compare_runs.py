"""The command `compare`: runs beside each other. Imports no torch."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console as RichConsole
from rich.text import Text

from trainer.commands.arguments import Subparsers, add_command, as_path
from trainer.console import formatting
from trainer.console.charts import loss_chart, sparkline
from trainer.console.text_table import text_table
from trainer.errors import ConfigError
from trainer.runs.compared_runs import (
    ComparedFigure,
    SeedGroup,
    cautions,
    compare_figures,
    config_differences,
    seed_groups,
)
from trainer.runs.recorded_run import find_run
from trainer.runs.run_figures import read_listed_run
from trainer.terminal import print_safe, single_line

_CHART: Final = (100, 8)
"""Most columns and lines of a chart."""
_MAX_CHARTS: Final = 4
_SHOWN: Final = 40
"""Most characters of a value of the config."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "compare", compare_command, example="runs/a runs/b --metric eval/loss")
    what = "run folder; those that differ only by seed are one group"
    parser.add_argument("runs", type=as_path, nargs="+", metavar="RUN", help=what)
    parser.add_argument("--metric", metavar="KEY", default="loss", help="metric to draw (loss), a key of metrics.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def compare_command(options: argparse.Namespace) -> int:
    """Compare runs: what their configs differ in, their curves, their final numbers with significance over seeds."""
    paths = list({path.resolve(): path for path in (find_run(path).path for path in options.runs)}.values())
    if len(paths) < 2:
        raise ConfigError(f"{paths[0]}: is one run, and two or more are compared; name another")
    groups = seed_groups([read_listed_run(path) for path in paths])
    differences, figures = config_differences(groups), compare_figures(groups)
    if options.json:
        print(json.dumps(_record(groups, differences, figures)))
        return 0
    labels = [chr(ord("a") + index) if index < 26 else str(index) for index in range(len(groups))]
    for label, group in zip(labels, groups, strict=True):
        seeds = f"  (seeds {', '.join(map(str, group.seeds))})" if len(group.runs) > 1 else ""
        print_safe(single_line(f"{label}  {', '.join(str(run.path) for run in group.runs)}{seeds}"))
    if differences:
        print()
        rows = [[key, *(_cut(value) for value in values)] for key, values in differences.items()]
        _print_table(["config", *labels], rows, left=range(len(labels) + 1))
    print()
    _draw(labels, groups, options.metric)
    print()
    _print_table(
        ["", *labels, *(f"{label} - a" for label in labels[1:])], [list(_figure_cells(figure)) for figure in figures]
    )
    for line in (
        *cautions(groups),
        *(f"{run.path}: {note}" for g in groups for run in g.runs for note in run.state.notes),
    ):
        print_safe(single_line(line))
    return 0


def _record(groups: Sequence[SeedGroup], differences: object, figures: Sequence[ComparedFigure]) -> dict[str, object]:
    return {
        "groups": [{"runs": [run.record() for run in group.runs], "seeds": list(group.seeds)} for group in groups],
        "config": differences,
        "figures": [figure.record() for figure in figures],
        "cautions": cautions(groups),
    }


def _draw(labels: Sequence[str], groups: Sequence[SeedGroup], metric: str) -> None:
    """Draw the curve of each group's first run: a chart each if there are few, else a line each."""
    console = RichConsole(highlight=False, markup=False, emoji=False, color_system=None)
    width = min(_CHART[0], console.width) - 4
    for label, group in zip(labels, groups, strict=True):
        steps, values = group.runs[0].log.series(metric)
        if not steps:
            print_safe(single_line(f"{label}  has no metric {metric}"))
        elif len(groups) <= _MAX_CHARTS:
            print_safe(single_line(f"{label}  {metric} of {group.runs[0].path}"))
            console.print(loss_chart(steps, values, width, _CHART[1]))
        else:
            console.print(Text(f"{label:2} {sparkline(values, width)}"))
    sys.stdout.flush()


def _figure_cells(figure: ComparedFigure) -> Iterator[str]:
    yield figure.key
    for mean, error in zip(figure.means, figure.standard_errors, strict=True):
        yield _number(mean) if error is None else f"{_number(mean)} \u00b1 {_number(error)}"
    for difference in figure.differences:
        if difference is None:
            yield formatting.DASH
        else:
            p = "" if difference.p is None else f" (p {difference.p:.2g})"
            yield f"{'+' if difference.mean >= 0 else ''}{_number(difference.mean)}{p}"


def _number(value: float | None) -> str:
    if value is None:
        return formatting.DASH
    return formatting.rate(value) if abs(value) >= 100 else f"{value:.4f}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    for line in text_table(header, rows, left=left):
        print_safe(line)
