"""The command `report`: all numbers of runs as JSON, and a page about them."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.atomic_io import replace_file
from trainer.commands.arguments import Subparsers, add_command, as_path, check_target, whole
from trainer.commands.reported_run import ReportedRun
from trainer.errors import ConfigError, ResourceError
from trainer.report.measure_options import MeasureOptions
from trainer.report.report_data import ReportData, report_json
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "runs/smoke -o report.html"
    sub = add_command(subparsers, "report", report_command, example=example)
    what = "run folders, such as runs/smoke; or the experiment files that they were trained from"
    sub.add_argument("runs", nargs="+", type=as_path, metavar="RUN", help=what)
    sub.add_argument("-o", "--output", type=as_path, metavar="FILE", help="HTML file for the page")
    what = "file for all numbers (standard output, if there is no page either)"
    sub.add_argument("--json", type=as_path, metavar="FILE", help=what)
    what = "write again and again while a run trains, until all have ended; checkpoints are measured when they are new"
    sub.add_argument("--follow", action="store_true", help=what)
    sub.add_argument("--every", type=whole, default=30, metavar="S", help="seconds between two pages of --follow (30)")
    what = "tokens of held-out text to measure, over all domains (65536)"
    sub.add_argument("--max-tokens", type=whole, default=MeasureOptions().max_tokens, metavar="N", help=what)
    what = "checkpoints of a run to compare, evenly spaced (6)"
    sub.add_argument("--checkpoints", type=whole, default=MeasureOptions().max_checkpoints, metavar="N", help=what)
    sub.add_argument("--step", type=whole, help="measure the checkpoint of this step instead of the newest")


def report_command(options: argparse.Namespace) -> int:
    """Report what runs learned: loss, routing, and what each expert is for, from their newest checkpoints."""
    for option, path in (("--output", options.output), ("--json", options.json)):
        check_target(option, path)
    if options.output is not None and options.json is not None and options.output.absolute() == options.json.absolute():
        raise ConfigError(f"--json: {options.json} is the file of the page too; name another one")
    if options.step is not None and len(options.runs) > 1:
        raise ConfigError(f"--step: chooses a checkpoint of one run, and {len(options.runs)} are named; name one")
    if options.follow and options.output is None:
        raise ConfigError("--follow: writes a page again and again; name it with -o FILE")
    how = MeasureOptions(max_tokens=options.max_tokens, max_checkpoints=options.checkpoints, step=options.step)
    runs = [ReportedRun(path, how) for path in options.runs]
    if options.follow:
        _follow(runs, options)
    else:
        # Of a run that cannot be measured the page still has the logs; a step that was asked for is there or an error.
        _write_report(runs, [run.newest() if options.step is None else run.measure() for run in runs], options)
    failures = [run.failure for run in runs if run.failure is not None]
    for failure in failures:
        print_safe(failure, file=sys.stderr)
    _say_written(options)
    return failures[0].exit_code if failures else 0


def _follow(runs: Sequence[ReportedRun], options: argparse.Namespace) -> None:
    """Write the report until all runs have ended, and once after that."""
    print_safe(
        f"writing {options.output} every {options.every} s until the training ends (Ctrl-C stops)", file=sys.stderr
    )
    while True:
        has_ended = all([run.has_ended() for run in runs])  # asked first: then nothing is written after it was read
        _write_report(runs, [run.newest() for run in runs], options)
        if has_ended:
            return
        time.sleep(options.every)


def _write_report(runs: Sequence[ReportedRun], found: Sequence[ReportData], options: argparse.Namespace) -> None:
    """Write the page and the numbers, each at once: a reader finds the old one or the new one."""
    if options.output is not None:
        from trainer.report.report_page import report_html

        _write(options.output, report_html(found, [run.recorded for run in runs]))
    if options.json is not None or options.output is None:
        text = json.dumps(report_json(list(found)), allow_nan=False)
        if options.json is None:
            print(text)
        else:
            _write(options.json, text)


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}; name another file") from None


def _say_written(options: argparse.Namespace) -> None:
    for path in (options.output, options.json):
        if path is not None:
            print_safe(f"written to {path}", file=sys.stderr)
