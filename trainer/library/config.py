"""Load an experiment file. Imports no torch."""

import os
from collections.abc import Iterable, Sequence

from trainer.commands.resolve import load_config_of
from trainer.commands.shipped import as_config
from trainer.config.nodes import shown_path
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Return the checked configuration of an experiment file or a run.

    Args:
        path: a YAML file, a run folder such as runs/smoke, or the name of a config of the package, such as "smoke".
        overrides: keys to change, as on the command line: `["train.steps=100", "model.moe.router.kind=switch"]`.

    Raises:
        TypeError: if an argument has the wrong type.
        ConfigError: with a line for each problem: file, line, column, key, and what to do.
    """
    if (
        isinstance(overrides, str)
        or not isinstance(overrides, Iterable)
        or not all(isinstance(override, str) for override in overrides)
    ):
        raise TypeError(f'overrides: expected a list of texts such as ["train.steps=100"], got {overrides!r}')
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a path or a name such as 'smoke', got {path!r}")
    try:
        return load_config_of(as_config(os.fspath(path)), overrides)
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{shown_path(path)}: cannot be read: {error.strerror}") from None


def check_config(config: object) -> None:
    """Check that an argument is a loaded config.

    Raises:
        TypeError: if it is not, such as a path.
    """
    if not isinstance(config, ExperimentConfig):
        hint = f"; write load_config({str(config)!r})" if isinstance(config, str | os.PathLike) else ""
        raise TypeError(f"config: expected an ExperimentConfig, got {type(config).__name__}{hint}")
