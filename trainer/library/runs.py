"""Train a config in this process, and read the files of a run."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.checkpoint.choice import CheckpointChoice, WeightsOf
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.final_page import write_final_page
from trainer.commands.init_from_parent import find_first_weights
from trainer.commands.resolve import check_run_folder, run_folder_of
from trainer.distributed.rank_layout import layout_from_environment
from trainer.distributed.signals import StopRequest
from trainer.experiment import ExperimentConfig
from trainer.library.config import check_config
from trainer.runs.recorded_run import RecordedRun, find_run
from trainer.status import StatusFile

if TYPE_CHECKING:
    from trainer.models.gpt import GPT


@dataclass(frozen=True, slots=True)
class Run(RecordedRun):
    """Run folder: its config, metrics, checkpoints and models."""

    def model(self, step: int | None = None, *, weights: WeightsOf = "raw") -> "GPT":
        """Return the model of a checkpoint, in evaluation mode and in this process.

        Args:
            step: one of `checkpoints`; None: the newest.
            weights: `ema` are their moving average (`train.ema`).

        Raises:
            CheckpointError: if there is none, it is damaged, or it has no such weights.
        """
        from trainer.training.load_trained import load_trained

        choice = CheckpointChoice(step=step, weights=weights)
        engine, _, _ = load_trained(self.config, RunFolder(self.path), choice, warn=lambda _: None)
        return engine.model.eval()


def load_run(path: str | os.PathLike[str]) -> Run:
    """Return the run of a folder, such as runs/smoke.

    Raises:
        CheckpointError: if it is not a run folder.
    """
    return Run(find_run(path).path)


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
        layout = layout_from_environment(config.parallel.degrees)
        warnings = check_run_folder(folder, config)
        status = StatusFile(folder.status, rank=layout.rank)
        first = find_first_weights(config, folder)
        with status.end_on_error():
            code = train_run(config, folder, layout, warnings=warnings, stop=stop, status=status, first_weights=first)
        if layout.rank == 0:
            write_final_page(config, folder, status, stop, is_finished=code == 0)
        status.end(code)
    if code != 0:
        raise KeyboardInterrupt(f"{folder.path}: stopped; call train again to resume")
    return Run(folder.path)
