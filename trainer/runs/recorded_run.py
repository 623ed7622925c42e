"""A run as its folder records it. Imports no torch."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.identity import read_record
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown_path
from trainer.errors import CheckpointError
from trainer.experiment import ExperimentConfig
from trainer.runs.recorded_config import recorded_config
from trainer.runs.recorded_log import read_log


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """Run folder: its config, logs and checkpoints, each read when it is asked for."""

    path: Path

    @property
    def folder(self) -> RunFolder:
        """The paths of its files."""
        return RunFolder(self.path)

    @property
    def config(self) -> ExperimentConfig:
        """The configuration the run was last started with."""
        return recorded_config(self.folder)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the records of metrics.jsonl: one per logged step, and one per evaluation."""
        yield from _records(self.folder.metrics)

    def routing(self) -> Iterator[dict[str, Any]]:
        """Yield the records of routing.jsonl: routing statistics of the MoE layers, one per logged step."""
        yield from _records(self.folder.routing)

    def environment(self) -> dict[str, Any]:
        """Return the values of environment.json: versions, device, fingerprints; none if it is missing or damaged."""
        return read_record(self.folder.environment)

    def series(self, key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the steps (N,) and values (N,) of one metric, such as "loss" or "eval/loss".

        Raises:
            KeyError: if no record has the metric; the message lists the available ones.
        """
        found, keys = [], dict[str, None]()
        for record in self.metrics():
            keys |= dict.fromkeys(record)
            if isinstance(value := record.get(key), int | float):
                found.append((record["step"], value))
        if not found:
            raise KeyError(f"{self.path} has no metric {key!r}; it has {', '.join(keys)}")
        steps, values = zip(*found, strict=True)
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)

    @property
    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint, in ascending order."""
        return sorted(CheckpointFolder(self.folder.checkpoints).steps())


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    try:
        return (path / "config.yaml").is_file()
    except (OSError, ValueError):  # not permitted; a name that no file can have
        return False


def find_run(path: str | os.PathLike[str]) -> RecordedRun:
    """Return the run of a folder, such as runs/smoke.

    Raises:
        CheckpointError: if it is not a run folder.
    """
    folder = Path(path)
    if not is_run(folder):
        raise CheckpointError(f"{shown_path(folder)}: has no config.yaml, so it is not a run folder")
    return RecordedRun(folder)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log; warn of each damaged line."""
    log = read_log(path)
    for number in log.damaged:
        warnings.warn(f"{path}: line {number} is damaged and left out", stacklevel=3)
    yield from log.records
