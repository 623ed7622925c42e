"""Load an experiment file. Imports no torch."""

import os
from collections.abc import Sequence

from trainer.config.loader import load
from trainer.experiment import ExperimentConfig


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Return the checked configuration of an experiment file.

    Args:
        path: a YAML file.
        overrides: keys to change, as on the command line: `["train.steps=100", "model.moe.router.kind=switch"]`.

    Raises:
        ConfigError: with a line for each problem: file, line, column, key, and what to do.
    """
    return load(path, overrides, ExperimentConfig)
