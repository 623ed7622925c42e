"""The shipped finder of learning rates is the one whose pick scripts/learning_rates.py compares with the grid."""

from pathlib import Path

from scripts.learning_rates import KEPT, RATES, RUNGS, STEPS, choose_rate, trained_steps
from trainer.sweep.plan_trials import plan_sweep
from trainer.sweep.sweep_config import HalvingConfig

FINDER = Path(__file__).parents[3] / "configs/sweeps/learning_rate.yaml"


def test_the_shipped_finder_has_the_rates_and_rungs_that_were_measured(tmp_path: Path) -> None:
    found = plan_sweep(FINDER, [f"runs_dir={tmp_path}"])
    assert tuple(trial.config.schedule.peak_lr for trial in found.trials) == RATES
    assert {trial.config.train.steps for trial in found.trials} == {STEPS}
    method = found.config.method
    assert isinstance(method, HalvingConfig) and method.eta == KEPT
    assert (method.first_steps, method.first_steps * KEPT) == RUNGS and RUNGS[-1] * KEPT == STEPS


def test_a_rate_that_falls_behind_at_a_rung_is_not_picked_whatever_it_would_end_at() -> None:
    ends = {rate: {48: number, 96: -number, STEPS: number} for number, rate in enumerate(RATES)}
    assert choose_rate(ends) == RATES[2], "three are left at step 48, and the last of them at step 96"
    assert trained_steps() == 6 * 48 + 3 * 48 + 96
