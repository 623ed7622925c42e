"""The option `--record` of commands that run a model."""

import argparse
from pathlib import Path

from trainer.commands.arguments import as_path
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.routing_record.replay_rules import record_problem


def add_record(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    what = "new folder for each token's experts (docs/routing_replay.md)"
    parser.add_argument("--record", type=as_path, metavar="DIR", help=what)


def check_record_option(options: argparse.Namespace, config: ExperimentConfig) -> None:
    """Check that the model's routing can be recorded, into a folder that is new or empty."""
    if options.record is None:
        return
    if (problem := record_problem(config.model.moe)) is not None:
        raise ConfigError(f"--record: {problem}; leave the option out")
    check_new_folder("--record", options.record)


def check_new_folder(key: str, folder: Path) -> None:
    """Check that a folder for a record is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{key}: {folder}: is not empty, and a record has a folder of its own; name another one")
