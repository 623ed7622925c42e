"""The command `sweep`: train an experiment at many values of its keys, and say which to choose."""

import argparse

from trainer.commands.arguments import Subparsers, add_command, add_overrides, as_path, whole
from trainer.sweep.plan_trials import plan_sweep
from trainer.sweep.run_sweep import run_sweep


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    sub = add_command(subparsers, "sweep", sweep_command, example="configs/sweeps/choose_k.yaml --slots 2")
    sub.add_argument("config", type=as_path, metavar="SWEEP", help="sweep file")
    add_overrides(sub, "train.steps=40, or seeds=[1,2] of the sweep")
    sub.add_argument("--slots", type=whole, metavar="N", help="trials at the same time (`slots` of the file)")


def sweep_command(options: argparse.Namespace) -> int:
    """Train an experiment at many values of its keys; a repeated command goes on where it was stopped."""
    return run_sweep(plan_sweep(options.config, options.overrides, slots=options.slots))
