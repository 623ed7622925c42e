"""Resolve the config and the run that a command line names."""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.config_changes import check_belongs
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.arguments import BEST
from trainer.commands.shipped import check_name
from trainer.config.check_packages import check_packages
from trainer.config.dump import Change, changed_keys
from trainer.config.loader import load
from trainer.errors import CheckpointError, ConfigError, MissingFile
from trainer.experiment import ExperimentConfig
from trainer.runs.recorded_config import recorded_config

_STEP: Final = re.compile(r"step_(\d{1,18})", re.ASCII)
"""Name of a checkpoint's folder."""


def load_named_config(options: argparse.Namespace) -> ExperimentConfig:
    """Load the experiment file of a command line, with its overrides."""
    check_name(options.config)
    return load(options.config, options.overrides, ExperimentConfig)


def load_config_of(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Load an experiment file, or the config of a run named by its folder."""
    if (path / "config.yaml").is_file():
        return recorded_config(RunFolder(path), overrides)
    check_name(path)
    return load(path, overrides, ExperimentConfig)


def run_to_read(path: Path) -> tuple[ExperimentConfig, RunFolder]:
    """Return config and folder of an existing run whose weights are read, named by its folder or its config file.

    Nothing but the run folder is read, so the working directory stays.
    """
    if path.is_dir() and not (path / "config.yaml").is_file():
        raise CheckpointError(f"{path}: has no config.yaml, so it is not a run folder; train first")
    config = load_config_of(path)
    return config, RunFolder(path) if path.is_dir() else run_folder_of(config)


def run_folder_of(config: ExperimentConfig) -> RunFolder:
    """Return the run folder of a config, which may not exist."""
    return RunFolder(Path(config.runs_dir) / config.name)


def check_run_folder(folder: RunFolder, config: ExperimentConfig) -> list[str]:
    """Compare a config with the one kept in its run folder; return warnings, or raise `ConfigError`."""
    changes: list[Change] = []
    if folder.config.is_file():
        try:
            changes = changed_keys(recorded_config(folder), config)
        except ConfigError as error:
            advice = "is the run's own record; remove it if it is damaged: checkpoints also record their model"
            raise ConfigError(f"{error}\n{folder.config}: {advice}") from None
    steps = {path.name for path in folder.checkpoints.glob("step_*")}
    goes_on = bool(steps - {"step_00000000"})  # at step 0 nothing was read
    return check_belongs(folder, changes, goes_on=goes_on, may_read_other_text=config.data.changed is not None)


def named_run_folder(options: argparse.Namespace) -> RunFolder:
    """Return a run folder named by its path or by a config file."""
    if not options.config.is_dir():
        folder = run_folder_of(load_named_config(options))
    else:
        _refuse_inside_run(options)
        if options.overrides:
            raise ConfigError(
                f"{options.config}: is a folder, and overrides need a config file; name one, or remove the overrides"
            )
        folder = RunFolder(options.config)
    resolve_best(options, folder)
    return folder


def run_to_train(options: argparse.Namespace) -> tuple[ExperimentConfig, RunFolder]:
    """Return config and folder of a run to start or resume, named by its config file or its folder."""
    if not (options.config / "config.yaml").is_file():
        _refuse_inside_run(options)
        if options.config.is_dir() and not any(options.config.glob("*.y*ml")):
            raise ConfigError(f"{options.config}: has no config.yaml: no run has started here; name a config file")
        config = load_named_config(options)
        check_packages(config)
        return config, run_folder_of(config)
    config, folder = existing_run(options)
    check_packages(config)
    kept = recorded_config(folder)
    if (config.runs_dir, config.name) != (kept.runs_dir, kept.name):
        raise ConfigError(
            f"{options.config}: is a run folder, and the overrides name another run; name a config file to start one"
        )
    return config, folder


def existing_run(
    options: argparse.Namespace, *, other_options: argparse.Namespace | None = None
) -> tuple[ExperimentConfig, RunFolder]:
    """Return config and folder of an existing run, named by its folder or by its config file.

    Paths in a config are relative to the working directory. For a run named by its folder, change to the directory it
    was started in, and make the paths among the options, and further ones in another namespace, absolute.
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
            for given in (options, other_options or options):
                vars(given).update({k: v.absolute() for k, v in vars(given).items() if isinstance(v, Path)})
            os.chdir(home)
    else:
        if not options.config.suffix and options.config.parent.name and not options.config.exists():
            raise ConfigError(f"{options.config}: no such file, and no such run folder")
        config = load_named_config(options)
        folder = run_folder_of(config)
    check_run_folder(folder, config)
    resolve_best(options, folder)
    return config, folder


def resolve_best(options: argparse.Namespace, folder: RunFolder) -> None:
    """Replace `--step best` by the step of the run's best checkpoint."""
    if getattr(options, "step", None) != BEST:
        return
    best = CheckpointFolder(folder.checkpoints).best()
    if best is None:
        raise CheckpointError(
            f"--step best: no checkpoint of {folder.path} says which one is the best; name a step, or train with "
            "checkpoint.best=eval/loss"
        )
    options.step = best.step


def _refuse_inside_run(options: argparse.Namespace) -> None:
    """Raise `CheckpointError`, with the run, if the named folder is a checkpoint or the folder of all checkpoints."""
    named: Path = options.config
    folder = named.absolute()
    step = _STEP.fullmatch(folder.name)
    checkpoints = folder if step is None else folder.parent
    if checkpoints.name != "checkpoints" or not (checkpoints.parent / "config.yaml").is_file():
        return
    depth = 1 if step is None else 2
    run = checkpoints.parent if len(named.parts) < depth else named.parents[depth - 1]
    if step is None:
        raise CheckpointError(f"{named}: is the checkpoints folder of a run; name the folder of the run: {run}")
    has_step = hasattr(options, "step") and getattr(options, "branch", "") is not None  # `train` has it for a branch
    advice = f"the run and its step: {run} --step {int(step[1])}" if has_step else f"the folder of the run: {run}"
    raise CheckpointError(f"{named}: is a checkpoint of a run; name {advice}")


@contextmanager
def suggest_prepare(config: ExperimentConfig) -> Iterator[None]:
    """Add the command `prepare` of the config to an error about a missing file."""
    try:
        yield
    except MissingFile as error:
        if config.prepare is None:
            raise
        advised = MissingFile(f"{error}, or make what this config reads: {config.prepare}")
        advised.is_rank_specific = error.is_rank_specific
        raise advised from None
