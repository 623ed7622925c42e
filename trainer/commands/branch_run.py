"""The option `--branch` of `train` and `launch`: a new run from a checkpoint of another one."""

import argparse
import re
import time
from pathlib import Path
from typing import Final

from trainer.checkpoint.branch import Branch
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.arguments import step_or_best
from trainer.commands.resolve import check_run_folder, existing_run
from trainer.config.check_packages import check_packages
from trainer.config.dump import dump
from trainer.config.nodes import shown
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.runs.recorded_config import recorded_config

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PATIENCE_S, _POLL_S = 600.0, 0.5
"""Time for the first machine to make the run."""


def add_branch(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command."""
    what = "start a new run of this name, beside RUN, from a checkpoint of RUN"
    parser.add_argument("--branch", metavar="NAME", help=what)
    what = "with --branch: the step of the checkpoint, or best (the newest)"
    parser.add_argument("--step", type=step_or_best, metavar="N", help=what)


def check_branch(options: argparse.Namespace) -> None:
    """Check the options by themselves.

    Raises:
        ConfigError: if they are wrong, or an override says otherwise.
    """
    if options.branch is None:
        if options.step is not None:
            raise ConfigError(
                f"--step {options.step}: says which checkpoint a --branch starts from; a run itself goes on from its "
                "newest; add --branch NAME, or leave it out"
            )
        return
    if not _NAME.fullmatch(options.branch):
        raise ConfigError(
            f"--branch {shown(options.branch)}: is not the name of a run; use letters, digits, '.', '_' and '-', at "
            "most 128; the new run is beside the other one"
        )
    for override in options.overrides:
        key = override.partition("=")[0]
        if key in ("name", "runs_dir"):
            raise ConfigError(f"{override}: --branch names the new run, which is beside the other one; leave it out")
        if key.partition(".")[0] == "init_from":
            raise ConfigError(f"{override}: --branch takes weights and moments from RUN; leave one of the two out")


def branch_to_train(options: argparse.Namespace) -> tuple[ExperimentConfig, RunFolder, Branch, list[str]]:
    """Return config and folder of a new run, how to make it, and warnings about changes since its parent.

    Raises:
        ConfigError: if the options are wrong, or the new run cannot be one of this model.
        CheckpointError: if the parent has no such checkpoint.
    """
    config, parent = existing_run(options)
    check_packages(config)
    warnings = check_run_folder(parent, config)
    _check_own_record(config, parent)
    config = config.model_copy(update={"name": options.branch, "init_from": None})  # it has a checkpoint
    beside = parent.path if parent.path.name not in ("", "..") else parent.path.resolve()
    branch = Branch(parent=parent, step=options.step, name=options.branch, config=dump(config))
    return config, RunFolder(beside.with_name(options.branch)), branch, warnings


def _check_own_record(config: ExperimentConfig, parent: RunFolder) -> None:
    """Refuse to record experts into the folder that the parent's record is in, which would be cut."""
    record = config.metrics.routing_record
    if record is None or record.path is None or not parent.config.is_file():
        return
    theirs = recorded_config(parent).metrics.routing_record
    if theirs is not None and theirs.path == record.path:
        raise ConfigError(
            f"metrics.routing_record.path: {record.path} has the record of {parent.path}; name another folder, or set "
            "metrics.routing_record.path=null"
        )


def wait_until_made(branch: Branch, final: Path) -> None:
    """Wait until the first machine has made the run; raise a ConfigError if it does not."""
    end = time.monotonic() + _PATIENCE_S
    while not branch.is_made(final):
        if time.monotonic() > end:
            raise ConfigError(
                f"{final}: has not been made by the first machine within {_PATIENCE_S:.0f} s; start the same command "
                "there, on a file system that all of them share"
            )
        time.sleep(_POLL_S)
