"""The command `sync-wandb`: upload a run to Weights & Biases from its metrics.jsonl."""

import argparse
from importlib.util import find_spec

from trainer.commands.arguments import Subparsers, add_command, add_run
from trainer.commands.resolve import named_run_folder
from trainer.errors import ConfigError, ResourceError
from trainer.terminal import print_safe
from trainer.trackers import wandb


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    add_run(add_command(subparsers, "sync-wandb", sync_wandb_command, example="runs/smoke"), with_overrides=False)


def sync_wandb_command(options: argparse.Namespace) -> int:
    """Upload the missing part of a run to Weights & Biases, after training offline or without a connection."""
    options.overrides = []
    folder = named_run_folder(options).path
    if not wandb.settings_path(folder).is_file():
        raise ConfigError(
            f"{folder}: was trained without wandb; set metrics.wandb.mode to offline or online, and start it again"
        )
    if find_spec("wandb") is None:
        raise ConfigError("sync-wandb: wandb is not installed here; pip install wandb")
    if not wandb.sync(folder, print_safe):
        raise ResourceError(f"{folder}: the upload is incomplete; repeat the command")
    return 0
