"""The command `status`: what is running here, how far, how fast. Imports no torch."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from trainer.commands.arguments import Subparsers, add_command, as_path
from trainer.console import formatting
from trainer.runs.find_runs import find_runs
from trainer.runs.recorded_run import is_run
from trainer.runs.run_state import RunProgress, read_state
from trainer.terminal import print_safe, single_line

_QUIET: Final = ("finished", "not started")
"""States that a folder of runs only counts: nothing is to be done."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "status", status_command, example="runs/smoke")
    what = "run folder, or a folder of runs (runs)"
    parser.add_argument("folders", type=as_path, nargs="*", metavar="FOLDER", help=what)
    parser.add_argument("--all", action="store_true", help="also show finished runs of a folder")
    parser.add_argument("--json", action="store_true", help="print one JSON list of all runs")


def status_command(options: argparse.Namespace) -> int:
    """Show what is running here: phase, step, speed, time left, loss, and ranks that are behind or silent."""
    folders = options.folders or [Path("runs")]
    states = {path: read_state(path) for path in find_runs(folders)}
    if options.json:
        print(json.dumps([{"run": str(path), **state.record()} for path, state in states.items()]))
        return 0
    named = {path for path in folders if is_run(path)}
    shown = {
        path: state
        for path, state in states.items()
        if options.all or path in named or state.state not in _QUIET or state.notes
    }
    for path, state in sorted(shown.items(), key=lambda item: item[1].state != "running"):
        for line in state_lines(str(path), state):
            print_safe(single_line(line) if line[0] != " " else f"  {single_line(line)}")
    counts = Counter(state.state for path, state in states.items() if path not in shown)
    if counts:
        print_safe(f"{', '.join(f'{n} {state}' for state, n in counts.items())}; --all shows them")
    elif not states:
        print_safe(f"no run in {', '.join(map(str, folders))}")
    return 0


def state_lines(name: str, state: RunProgress) -> Iterator[str]:
    """Yield the lines about one run; all but the first begin with a space."""
    of = "" if state.steps is None else f" of {state.steps}"
    share = f" ({formatting.percent(state.step / state.steps)})" if state.steps else ""
    phase = "" if state.phase is None else f", {state.phase}"
    code = f" with exit code {state.exit_code}" if state.exit_code else ""
    yield f"{name}: {state.state}{code}{phase}, step {state.step}{of}{share}"
    if state.error is not None:
        yield f" {state.error}"
    facts = []
    if state.tokens_per_s is not None:
        facts.append(f"{formatting.rate(state.tokens_per_s)} tokens/s")
    if state.step_s is not None:
        facts.append(f"{state.step_s:.3g} s a step")
    if state.left_s is not None:
        facts.append(f"{formatting.duration(state.left_s)} left")
    if state.loss is not None:
        facts.append(f"loss {formatting.number(state.loss)}")
    if facts:
        yield f" {', '.join(facts)}"
    if state.ranks:
        ranks = "1 rank" if state.ranks == 1 else f"{state.ranks} ranks"
        seen = "last seen" if state.state in ("running", "unknown") else "last written"
        yield f" {ranks} on {', '.join(state.hosts)}, {seen} {formatting.duration(state.age_s)} ago"
    if state.state == "killed":
        yield f" its processes are gone without an end; python -m trainer train {name} continues it"
    if state.state == "unknown":
        yield " it ran on another machine, which has not written since; look there"
    yield from (f" {line}" for line in (*state.troubled, *state.notes))
