"""Learning rates at the boundaries of schedules."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from trainer.config import slots
from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.optim.registry import ScheduleConfig, WarmupCosineConfig, WarmupStableDecayConfig
from trainer.optim.schedule import resolve_warmup

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps")


def test_warmup_rises_to_the_peak_and_the_cosine_ends_at_its_final_fraction() -> None:
    lr = WarmupCosineConfig(peak_lr=1.0, warmup_steps=10, final_fraction=0.1).build(total_steps=111)
    assert [lr(0), lr(4), lr(9), lr(10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert lr(60) == pytest.approx(0.55)  # halfway: the mean of peak and end
    assert lr(110) == pytest.approx(0.1) == lr(500)
    assert all(lr(s) >= lr(s + 1) for s in range(10, 110))


def test_warmup_stable_decay_is_flat_and_then_falls_over_its_last_part() -> None:
    config = WarmupStableDecayConfig(peak_lr=2.0, warmup_steps=5, decay_fraction=0.2, final_fraction=0.5)
    lr = config.build(total_steps=100)
    assert lr(0) == pytest.approx(0.4) and lr(5) == lr(50) == lr(79) == 2.0
    assert lr(80) == pytest.approx(2.0 * (1 - 0.5 / 20))
    assert lr(99) == pytest.approx(1.0) == lr(200)


def test_no_warmup_and_no_decay_are_possible() -> None:
    assert WarmupCosineConfig(peak_lr=1.0, warmup_steps=0).build(total_steps=10)(0) == 1.0
    assert WarmupStableDecayConfig(peak_lr=1.0, warmup_steps=0, decay_fraction=0).build(total_steps=10)(9) == 1.0
    assert WarmupCosineConfig(peak_lr=1.0, warmup_steps=0).build(total_steps=1)(0) == 1.0


def test_warmup_that_is_not_configured_fits_any_run() -> None:
    assert [resolve_warmup(None, n) for n in (1, 9, 40, 1000, 10**6)] == [0, 0, 4, 100, 100]
    assert WarmupCosineConfig(peak_lr=1.0).build(total_steps=40)(3) == 1.0


def test_warmup_as_a_share_of_the_run_fits_any_run_and_a_number_is_taken_as_it_is() -> None:
    assert [resolve_warmup(0.1, n) for n in (1, 4, 20, 500)] == [0, 0, 2, 50]
    assert [resolve_warmup(0.999, n) for n in (1, 2, 500)] == [0, 1, 499]
    assert [resolve_warmup(0.0, 10), resolve_warmup(0, 10), resolve_warmup(7, 10)] == [0, 0, 7]


@pytest.mark.parametrize("config", slots.sections(ScheduleConfig), ids=lambda config: config.__name__)
def test_no_schedule_jumps_whatever_its_options_are(config: Any) -> None:
    """Between steps the rate changes at most by the slope of its warmup or decay."""
    peak, checked = 2.0, 0
    shares = {"decay_fraction": (0.0, 0.01, 0.2, 0.5, 0.9, 1.0), "final_fraction": (0.0, 0.3, 1.0)}
    names = [name for name in shares if name in config.model_fields]
    combinations = list(itertools.product(*(shares[name] for name in names)))
    for steps, values in itertools.product((1, 2, 3, 20, 100, 251), combinations):
        for asked in (None, 0, 1, steps // 2, steps - 1, 0.05, 0.5, 0.999):
            if isinstance(asked, int) and asked >= steps:
                continue
            chosen = dict(zip(names, values, strict=True))
            lr = config(peak_lr=peak, warmup_steps=asked, **chosen).build(total_steps=steps)
            rates = [lr(step) for step in range(steps + 3)]
            assert all(0 <= rate <= peak for rate in rates), (steps, asked, chosen)
            warmup = resolve_warmup(asked, steps)
            falls = round(chosen.get("decay_fraction", 1) * steps)
            steepest = math.pi / 2 / max(1, min(falls, steps - 1 - warmup))  # the slope of a cosine at its middle
            most = peak * max(1 / max(1, warmup), steepest)
            jumps = [abs(b - a) for a, b in itertools.pairwise(rates)]
            assert max(jumps) <= most * (1 + 1e-9), (steps, asked, chosen, max(jumps), most)
            checked += 1
    assert checked > 100


def test_the_decay_of_a_short_run_begins_where_its_warmup_ends() -> None:
    """A short trial, `train.steps=100` with a warmup of 50 and a decay of 0.9, used to drop by half at once."""
    config = WarmupStableDecayConfig(peak_lr=1.0, warmup_steps=50, decay_fraction=0.9)
    lr = config.build(total_steps=100)
    assert [lr(49), lr(50), lr(74), lr(99)] == pytest.approx([1.0, 0.98, 0.5, 0.0])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_can_be_tried_for_a_few_steps(path: Path) -> None:
    for steps in (2, 20, 100):
        config = load(path, [f"train.steps={steps}"], ExperimentConfig)
        assert resolve_warmup(config.schedule.warmup_steps, steps) <= steps / 5
