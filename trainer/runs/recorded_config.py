"""Read the config kept in a run folder: checked by the schema, or only its plain values."""

import os
import warnings
from collections.abc import Sequence
from typing import Any, Final

from trainer.atomic_io import open_regular
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.config.nodes import Finding, SourceLocation, Unreadable, report
from trainer.config.old_names import OldNameWarning
from trainer.config.plugins import searching
from trainer.config.yaml_nodes import compose
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig

_MAX_BYTES: Final = 1 << 20


def recorded_config(folder: RunFolder, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Load the config kept in a run folder, without warnings about old names: the user did not write it.

    Plug-ins are also looked up in the working directory that the run was started in.
    """
    with warnings.catch_warnings(), searching(folder.recorded_directories()):
        warnings.simplefilter("ignore", OldNameWarning)
        return load(folder.config, overrides, ExperimentConfig)


def plain_config(folder: RunFolder) -> dict[str, Any]:
    """Return the values of the config kept in a run folder, unchecked: no plug-in of the run is imported.

    Raises:
        ConfigError: if the file is missing, or not one of ours.
    """
    path, findings = folder.config, list[Finding]()
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), encoding="utf-8") as file:
            text = file.read(_MAX_BYTES)
        node = compose(text, lambda line, column: SourceLocation(0, line, column, str(path)), findings)
    except Unreadable as error:
        raise report([*findings, error.finding]) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is damaged (it is not UTF-8 text); restore it, or remove the run") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    values = None if node is None else node.plain()
    if findings or not isinstance(values, dict):
        raise ConfigError(f"{path}: is damaged (it is not a mapping of keys); restore it, or remove the run")
    return values
