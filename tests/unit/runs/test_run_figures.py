"""Figures of a run's log."""

import pytest

from trainer.runs.recorded_log import RecordedLog
from trainer.runs.run_figures import figures_of, train_seconds

STARTED, LATER = {"step": 1, "step_s": 5.0}, {"step": 10, "step_s": 0.5}
EVALUATED, RESUMED = {"step": 10, "eval/loss": 2.0}, {"step": 12, "step_s": 0.25}


def test_the_time_of_a_training_is_that_of_all_its_steps_whatever_else_was_logged() -> None:
    records = [STARTED, LATER, EVALUATED, RESUMED]
    assert train_seconds(records) == pytest.approx(5.0 + 9 * 0.5 + 2 * 0.25, rel=1e-12)
    assert figures_of(RecordedLog(records=records)).train_s == train_seconds(records)


def test_absurd_times_count_for_nothing() -> None:
    absurd = [{"step": 11, "step_s": value} for value in (None, "1", True, -1.0, float("nan"), 1 << 60)]
    assert train_seconds([STARTED, LATER, *absurd]) == train_seconds([STARTED, LATER])
    assert train_seconds([LATER, STARTED]) >= 0 and train_seconds([]) == 0
    assert figures_of(RecordedLog()).train_s is None
