"""Train a config in this process, and read the files of a run."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.init_from_parent import find_first_weights
from trainer.commands.resolve import check_run_folder, recorded_config, run_folder_of
from trainer.distributed.rank_layout import layout_from_environment
from trainer.distributed.signals import StopRequest
from trainer.errors import CheckpointError
from trainer.experiment import ExperimentConfig
from trainer.library.config import check_config
from trainer.metrics.records import parse_record, read_lines
from trainer.status import StatusFile

if TYPE_CHECKING:
    from trainer.models.gpt import GPT


@dataclass(frozen=True, slots=True)
class Run:
    """Run folder: its config, metrics and checkpoints."""

    path: Path

    @property
    def config(self) -> ExperimentConfig:
        """The configuration the run was last started with."""
        return recorded_config(RunFolder(self.path))

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the records of metrics.jsonl: one per logged step, and one per evaluation."""
        yield from _records(RunFolder(self.path).metrics)

    def routing(self) -> Iterator[dict[str, Any]]:
        """Yield the records of routing.jsonl: routing statistics of the MoE layers, one per logged step."""
        yield from _records(RunFolder(self.path).routing)

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
        return sorted(CheckpointFolder(RunFolder(self.path).checkpoints).steps())

    def model(self, step: int | None = None) -> "GPT":
        """Return the model of a checkpoint, in evaluation mode and in this process.

        Args:
            step: one of `checkpoints`; None: the newest.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        from trainer.training.load_trained import load_trained

        engine, _, _ = load_trained(self.config, RunFolder(self.path), step=step, warn=lambda _: None)
        return engine.model.eval()


def load_run(path: str | os.PathLike[str]) -> Run:
    """Return the run of a folder, such as runs/smoke.

    Raises:
        CheckpointError: if it is not a run folder.
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        raise CheckpointError(f"{folder.path}: has no config.yaml, so it is not a run folder")
    return Run(folder.path)


def train(config: ExperimentConfig) -> Run:
    """Train a config in this process, or resume its run, as `turnout train` does, and return the run.

    Under torchrun, every rank calls it.

    Raises:
        TypeError: if it is not an `ExperimentConfig`.
        TurnoutError: the error that `turnout train` would print.
        KeyboardInterrupt: if a signal stopped the run; a checkpoint was saved, and the next call resumes.
    """
    from trainer.training.main import train_run

    check_config(config)
    folder = run_folder_of(config)
    with StopRequest() as stop:
        layout = layout_from_environment(ep_size=config.parallel.ep_size, shard_size=config.parallel.shard_size)
        warnings = check_run_folder(folder, config)
        status = StatusFile(folder.status, rank=layout.rank)
        first = find_first_weights(config, folder)
        with status.end_on_error():
            code = train_run(config, folder, layout, warnings=warnings, stop=stop, status=status, first_weights=first)
        status.end(code)
    if code != 0:
        raise KeyboardInterrupt(f"{folder.path}: stopped; call train again to resume")
    return Run(folder.path)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, without an incomplete last line; warn of each damaged one."""
    for number, line in enumerate(read_lines(path) if path.is_file() else (), 1):
        if not line.endswith(b"\n"):
            continue
        record = parse_record(line)
        if record is None:
            warnings.warn(f"{path}: line {number} is damaged and left out", stacklevel=2)
        else:
            yield record
