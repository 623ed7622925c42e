"""Resolve the config and the run that a command line names."""

import argparse
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from trainer.checkpoint.config_changes import check_belongs
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.shipped import check_name
from trainer.config.dump import Change, changed_keys
from trainer.config.loader import load
from trainer.config.old_names import OldNameWarning
from trainer.config.packages import check_packages
from trainer.errors import CheckpointError, ConfigError, MissingFile
from trainer.experiment import ExperimentConfig

_STEP: Final = re.compile(r"step_(\d{1,18})", re.ASCII)
"""Name of the folder of a checkpoint."""


def named_config(options: argparse.Namespace) -> ExperimentConfig:
    """Return the config of an experiment file, with its overrides."""
    check_name(options.config)
    return load(options.config, options.overrides, ExperimentConfig)


def recorded_config(folder: RunFolder, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Return the config that a run folder keeps; no warning about old names, since its user did not write it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OldNameWarning)
        return load(folder.config, overrides, ExperimentConfig)


def folder_of(config: ExperimentConfig) -> RunFolder:
    """Return the folder of a config's run, which need not be there."""
    return RunFolder(Path(config.runs_dir) / config.name)


def checked(folder: RunFolder, config: ExperimentConfig) -> list[str]:
    """Return warnings about what differs between the config that a run folder keeps and the one given now.

    Raises:
        ConfigError: if the folder is another model's, or its own record cannot be read.
    """
    return check_belongs(folder, _changes(folder, config), goes_on=any(folder.checkpoints.glob("step_*")))


def named_run(options: argparse.Namespace) -> RunFolder:
    """Return a run folder that is named by itself, whatever its config, or by a config file."""
    if not options.config.is_dir():
        return folder_of(named_config(options))
    _refuse_inside_run(options)
    if options.overrides:
        raise ConfigError(
            f"{options.config}: is a folder, and overrides change a config file; name that, or leave them"
        )
    return RunFolder(options.config)


def run_to_train(options: argparse.Namespace) -> tuple[ExperimentConfig, RunFolder]:
    """Return config and folder of a run that is named by its config file or, if it has begun, by its folder.

    Raises:
        ConfigError: if it is named by its folder, and overrides would give it another.
    """
    if not (options.config / "config.yaml").is_file():
        _refuse_inside_run(options)
        config = named_config(options)
        check_packages(config)
        return config, folder_of(config)
    config, folder = existing_run(options)
    check_packages(config)
    kept = recorded_config(folder)
    if (config.runs_dir, config.name) != (kept.runs_dir, kept.name):
        raise ConfigError(
            f"{options.config}: is the folder of a run, which goes on in it; name a config file to start another run"
        )
    return config, folder


def existing_run(
    options: argparse.Namespace, *, beside: argparse.Namespace | None = None
) -> tuple[ExperimentConfig, RunFolder]:
    """Return config and folder of a run that is named by its folder or by its config file.

    Paths of a config are relative to the working directory. That of a run that is named by its folder becomes the one
    that it was started in, whose files it needs; paths among the options go on meaning what they meant.

    Args:
        options: with `config` and `overrides`.
        beside: other options of the command line.
    """
    if options.config.is_dir():
        folder = RunFolder(options.config)
        if not folder.config.is_file():
            _refuse_inside_run(options)
            raise CheckpointError(f"{folder.path}: has no config.yaml, so it is not a run folder; train first")
        config = recorded_config(folder, options.overrides)
        home = folder.start_directory(runs_dir=config.runs_dir, name=config.name)
        if home is not None and not home.samefile(Path.cwd()):
            folder = RunFolder(folder.path.absolute())
            for given in (options, beside or options):
                vars(given).update({k: v.absolute() for k, v in vars(given).items() if isinstance(v, Path)})
            os.chdir(home)
    else:
        config = named_config(options)
        folder = folder_of(config)
    checked(folder, config)
    return config, folder


def _refuse_inside_run(options: argparse.Namespace) -> None:
    """Name the run where a folder inside of it was named.

    Raises:
        CheckpointError: if the folder is a checkpoint of a run, or that of all its checkpoints.
    """
    named: Path = options.config
    folder = named.absolute()
    step = _STEP.fullmatch(folder.name)
    checkpoints = folder if step is None else folder.parent
    if checkpoints.name != "checkpoints" or not (checkpoints.parent / "config.yaml").is_file():
        return
    num_inside = 1 if step is None else 2
    run = checkpoints.parent if len(named.parts) < num_inside else named.parents[num_inside - 1]
    if step is None:
        raise CheckpointError(f"{named}: is where a run's checkpoints are; name the folder of the run: {run}")
    advice = f"name the run and its step: {run} --step {int(step[1])}"
    if not hasattr(options, "step"):
        advice = f"name the folder of the run: {run}"
    raise CheckpointError(f"{named}: is a checkpoint of a run; {advice}")


@contextmanager
def telling_what_makes_it(config: ExperimentConfig) -> Iterator[None]:
    """Let an error about a file that is missing name the command that makes what a config reads."""
    try:
        yield
    except MissingFile as error:
        if config.prepare is None:
            raise
        told = MissingFile(f"{error}, or make what this config reads: {config.prepare}")
        told.is_rank_specific = error.is_rank_specific
        raise told from None


def _changes(folder: RunFolder, config: ExperimentConfig) -> list[Change]:
    """Return what differs from the config a run folder keeps; nothing if it keeps none."""
    if not folder.config.is_file():
        return []
    try:
        return changed_keys(recorded_config(folder), config)
    except ConfigError as error:
        advice = (
            f"{folder.config}: is the run's own record; remove it if it is damaged, its checkpoints know their model"
        )
        raise ConfigError(f"{error}\n{advice}") from None
