"""The command `report`: all numbers of runs as JSON, and a page about them."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trainer.atomic_io import replace_file
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.arguments import Subparsers, add_command, as_path, whole
from trainer.commands.resolve import existing_run, suggest_prepare
from trainer.errors import ConfigError, ResourceError
from trainer.experiment import ExperimentConfig
from trainer.report.measure_options import MeasureOptions
from trainer.report.report_data import ReportData, report_json
from trainer.runs.recorded_run import RecordedRun
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "runs/smoke --json report.json"
    sub = add_command(subparsers, "report", report_command, example=example)
    what = "run folders, such as runs/smoke; or the experiment files that they were trained from"
    sub.add_argument("runs", nargs="+", type=as_path, metavar="RUN", help=what)
    sub.add_argument("--json", type=as_path, metavar="FILE", help="file for all numbers (standard output)")
    what = "tokens of held-out text to measure, over all domains (65536)"
    sub.add_argument("--max-tokens", type=whole, default=MeasureOptions().max_tokens, metavar="N", help=what)
    what = "checkpoints of a run to compare, evenly spaced (6)"
    sub.add_argument("--checkpoints", type=whole, default=MeasureOptions().max_checkpoints, metavar="N", help=what)
    sub.add_argument("--step", type=whole, help="measure the checkpoint of this step instead of the newest")


def report_command(options: argparse.Namespace) -> int:
    """Report what runs learned: loss, routing, and what each expert is for, from their newest checkpoints."""
    target = None if options.json is None else options.json.absolute()
    _check_target("--json", target)
    if options.step is not None and len(options.runs) > 1:
        raise ConfigError(f"--step: chooses a checkpoint of one run, and {len(options.runs)} are named; name one")
    for path in options.runs:  # before minutes are spent on the first
        with _at_home_of(path):
            pass
    found = [_measure(path, options) for path in options.runs]
    text = json.dumps(report_json(found), allow_nan=False)
    if target is None:
        print(text)
    else:
        _write(target, text)
    return 0


@contextmanager
def _at_home_of(path: Path) -> Iterator[tuple[ExperimentConfig, RunFolder]]:
    """Yield config and folder of a run, in the directory that the run was started in; then return to this one."""
    here = Path.cwd()
    try:
        yield existing_run(argparse.Namespace(config=path, overrides=[]))
    finally:
        os.chdir(here)


def _measure(path: Path, options: argparse.Namespace) -> ReportData:
    """Measure a run."""
    from trainer.report.measure_run import measure_run

    how = MeasureOptions(max_tokens=options.max_tokens, max_checkpoints=options.checkpoints, step=options.step)
    with _at_home_of(path) as (config, folder), suggest_prepare(config):
        found = measure_run(RecordedRun(folder.path), config, how, _warn)
    return replace(found, card=replace(found.card, folder=str(path)))


def _warn(line: str) -> None:
    print_safe(f"warning: {line}", file=sys.stderr)


def _check_target(option: str, path: Path | None) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        problem = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"{option}: {path}: {problem}; name a file in a folder that exists")


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}; name another file") from None
    print(f"written to {path}", file=sys.stderr)
