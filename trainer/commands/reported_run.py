"""A run that is named on the command line of `report`: measured in the directory that it was started in."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.resolve import existing_run, suggest_prepare
from trainer.errors import CheckpointError, DataError
from trainer.experiment import ExperimentConfig
from trainer.report.measure_options import MeasureOptions
from trainer.report.report_data import ReportData
from trainer.report.run_card import card_of_run
from trainer.runs.recorded_run import RecordedRun
from trainer.terminal import print_safe, single_line


class ReportedRun:
    """A run and its newest numbers, which are measured again when it has a new checkpoint."""

    def __init__(self, path: Path, options: MeasureOptions) -> None:
        """Check that there is such a run, before minutes are spent on another.

        Raises:
            ConfigError: if there is none.
        """
        self._path, self._options = path, options
        self._measured: ReportData | None = None
        self._newest: int | None = None  # step of the newest checkpoint when it was measured, damaged or not
        self._is_ending = False
        self.failure: CheckpointError | DataError | None = None
        """Why the newest checkpoint was not measured, the last time that it was tried."""
        with self._at_home() as (_, folder):
            self.recorded = RecordedRun(folder.path.absolute())

    def measure(self) -> ReportData:
        """Return the numbers of the run.

        Raises:
            CheckpointError: if its checkpoint is damaged or missing.
            DataError: if its text is gone.
        """
        from trainer.report.measure_run import measure_run

        with self._at_home() as (config, _), suggest_prepare(config):
            found = measure_run(self.recorded, config, self._options, _warn)
        self._measured = replace(found, card=replace(found.card, folder=str(self._path)))
        return self._measured

    def newest(self) -> ReportData:
        """Return the numbers of a run that may be training: of its newest checkpoint, and of its logs as they are now.

        What cannot be measured now, such as a checkpoint that is being removed, is left out: a remark and `failure` say
        why.
        """
        newest = max(CheckpointFolder(self.recorded.folder.checkpoints).steps(), default=None)
        before, remark, self.failure = self._measured, "", None
        if before is None or (self._options.step is None and newest != self._newest):
            try:
                found, self._newest = self.measure(), newest
                return found
            except (CheckpointError, DataError) as error:
                remark = f"The newest checkpoint was not measured: {single_line(str(error))}"
                self.failure = error
        with self._at_home() as (config, _):
            card = card_of_run(self.recorded, config)
        remarks = (remark,) if remark else ()
        if before is None:
            return ReportData(card=replace(card, folder=str(self._path)), remarks=remarks)
        known = replace(
            before.card, last=card.last, trained_tokens=card.trained_tokens, training_load=card.training_load
        )
        return replace(before, card=known, remarks=(*before.remarks, *remarks))

    def has_ended(self) -> bool:
        """Return whether nobody trains the run any more.

        A launcher that starts ranks again leaves it alone for moments: so the second time that it is found so counts,
        unless all its steps are done.
        """
        if self.recorded.folder.owner() is not None:
            self._is_ending = False
            return False
        was_ending, self._is_ending = self._is_ending, True
        with self._at_home() as (config, _):
            card = card_of_run(self.recorded, config)
        return was_ending or card.last.get("step", 0) >= card.planned_steps

    @contextmanager
    def _at_home(self) -> Iterator[tuple[ExperimentConfig, RunFolder]]:
        """Yield config and folder, in the directory that the run was started in; then return to this one."""
        here = Path.cwd()
        try:
            yield existing_run(argparse.Namespace(config=self._path, overrides=[]))
        finally:
            os.chdir(here)


def _warn(line: str) -> None:
    print_safe(f"warning: {line}", file=sys.stderr)
