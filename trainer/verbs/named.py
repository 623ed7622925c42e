"""Which config and which run the words of a command line name."""

import argparse
from pathlib import Path

from trainer.checkpoint.run_folder import RunFolder, check_belongs
from trainer.config.dump import Change, changed_keys
from trainer.config.loader import load
from trainer.errors import CheckpointError, ConfigError
from trainer.experiment import ExperimentConfig


def named_config(options: argparse.Namespace) -> ExperimentConfig:
    """Return the config of an experiment file, with its overrides."""
    return load(options.config, options.overrides, ExperimentConfig)


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
    if options.overrides:
        raise ConfigError(
            f"{options.config}: is a folder, and overrides change a config file; name that, or leave them"
        )
    return RunFolder(options.config)


def existing_run(options: argparse.Namespace) -> tuple[ExperimentConfig, RunFolder]:
    """Return config and folder of a run that is named by its folder or by its config file."""
    if options.config.is_dir():
        folder = RunFolder(options.config)
        if not folder.config.is_file():
            raise CheckpointError(f"{folder.path}: has no config.yaml, so it is not a run folder; train first")
        config = load(folder.config, options.overrides, ExperimentConfig)
    else:
        config = named_config(options)
        folder = folder_of(config)
    checked(folder, config)
    return config, folder


def _changes(folder: RunFolder, config: ExperimentConfig) -> list[Change]:
    """Return what differs from the config a run folder keeps; nothing if it keeps none."""
    if not folder.config.is_file():
        return []
    try:
        return changed_keys(load(folder.config, [], ExperimentConfig), config)
    except ConfigError as error:
        advice = (
            f"{folder.config}: is the run's own record; remove it if it is damaged, its checkpoints know their model"
        )
        raise ConfigError(f"{error}\n{advice}") from None
