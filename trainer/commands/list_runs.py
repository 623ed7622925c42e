"""The command `runs`: the runs of a folder as a table. Imports no torch."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trainer.commands.arguments import Subparsers, add_command, as_path
from trainer.config.wording import choice
from trainer.console import formatting
from trainer.console.text_table import text_table
from trainer.errors import ConfigError
from trainer.runs.find_runs import find_runs
from trainer.runs.run_figures import ListedRun, read_listed_run
from trainer.terminal import print_safe, single_line

COLUMNS: Final[Mapping[str, tuple[str, Callable[[Any], str]]]] = {
    "run": ("run", str),
    "state": ("state", str),
    "step": ("step", str),
    "tokens": ("tokens", formatting.rate),
    "loss": ("loss", formatting.number),
    "eval_loss": ("eval loss", formatting.number),
    "bits_per_byte": ("bits/byte", formatting.number),
    "train_s": ("time", formatting.duration),
    "parent": ("made from", lambda parent: parent or ""),
}
"""Heading and format of each column, by its key in the JSON records, which `--sort` takes."""
_LEFT: Final = (0, 1, len(COLUMNS) - 1)


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "runs", runs_command, example="runs --sort eval_loss")
    what = "folder of runs (runs)"
    parser.add_argument("folders", type=as_path, nargs="*", metavar="FOLDER", help=what)
    what = f"order by one of {', '.join(COLUMNS)}, smallest first; a minus before it (--sort=-tokens): largest first"
    parser.add_argument("--sort", metavar="KEY", default="run", help=what)
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def runs_command(options: argparse.Namespace) -> int:
    """List the runs of a folder: state, step, tokens, losses, time, and what each was made from."""
    key = options.sort.removeprefix("-")
    if key not in COLUMNS:
        raise ConfigError(f"--sort: {choice(key, list(COLUMNS))}")
    folders = options.folders or [Path("runs")]
    found = (read_listed_run(path, keeps_log=False) for path in find_runs(folders))
    runs = sorted_runs(found, key, is_reversed=options.sort.startswith("-"))
    if options.json:
        print(json.dumps([run.record() for run in runs]))
        return 0
    if not runs:
        print_safe(f"no run in {', '.join(map(str, folders))}")
        return 0
    for line in text_table([heading for heading, _ in COLUMNS.values()], [_cells(run) for run in runs], left=_LEFT):
        print_safe(line)
    for run in runs:
        for note in run.state.notes:
            print_safe(single_line(f"{run.path}: {note}"))
    return 0


def sorted_runs(runs: Iterable[ListedRun], key: str, *, is_reversed: bool) -> Sequence[ListedRun]:
    """Sort runs by a column; those without a value come last either way."""
    values = [(run.record()[key], run) for run in runs]
    known = [(value, run) for value, run in values if value is not None]
    known.sort(key=lambda pair: pair[0], reverse=is_reversed)
    return [run for _, run in known] + [run for value, run in values if value is None]


def _cells(run: ListedRun) -> list[str]:
    record = run.record()
    record["step"] = str(run.state.step) if run.state.steps is None else f"{run.state.step}/{run.state.steps}"
    return [write(record[key]) for key, (_, write) in COLUMNS.items()]
