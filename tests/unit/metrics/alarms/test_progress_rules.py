"""Alarms about progress: losses made of a power law and noise, and recorded times of ranks."""

import math
import random

from trainer.metrics.alarms.config import AlarmsConfig
from trainer.metrics.alarms.observation import Observation
from trainer.metrics.alarms.progress_rules import LossPlateau, slow_rank
from trainer.metrics.alarms.symptom import Symptom

CONFIG = AlarmsConfig()


def seen(step: int, loss: float, lr: float = 1e-3) -> Observation:
    return Observation(step=step, loss=loss, lr=lr, grad_norm=1.0)


def plateau(rule: LossPlateau, losses: dict[int, float], lr: float = 1e-3) -> list[tuple[int, Symptom]]:
    return [(step, found) for step, loss in losses.items() for found in rule.find(seen(step, loss, lr))]


def power_law(steps: int, every: int, *, exponent: float, noise: float) -> dict[int, float]:
    draw = random.Random(0)
    return {step: 1.5 + 4 * step**-exponent + draw.gauss(0, noise) for step in [1, *range(every, steps + 1, every)]}


def test_a_flat_loss_rings_within_100_steps_and_a_falling_or_noisy_one_does_not() -> None:
    flat = {step: 5.5 + 0.01 * math.sin(step) for step in [1, *range(10, 101, 10)]}
    assert plateau(LossPlateau(CONFIG), flat)[0][0] <= 100
    falling = {step: 5.5 - 0.002 * step for step in flat}
    assert not plateau(LossPlateau(CONFIG), falling)
    noisy = {step: 5.5 + (step // 10 % 2) * 0.5 for step in flat}
    assert not plateau(LossPlateau(CONFIG), noisy), "a fall would not have been noticed"


def test_a_loss_that_falls_by_a_power_of_the_steps_never_rings() -> None:
    losses = power_law(100_000, 50, exponent=0.1, noise=0.03)
    assert not plateau(LossPlateau(CONFIG), losses)


def test_a_loss_that_has_stopped_to_fall_rings_after_a_long_run_too() -> None:
    losses = power_law(20_000, 20, exponent=0.3, noise=0.02)
    stuck = {step: losses[10_000] for step in range(20_020, 80_000, 20)}
    rule = LossPlateau(CONFIG)
    assert not plateau(rule, losses) and plateau(rule, stuck)


def test_a_rate_of_zero_rings_and_one_that_warms_up_or_decays_is_no_plateau() -> None:
    flat = {step: 5.5 for step in [1, *range(10, 101, 10)]}
    assert "rate is 0" in plateau(LossPlateau(CONFIG), flat, lr=0.0)[0][1].text
    warming, decaying = LossPlateau(CONFIG), LossPlateau(CONFIG)
    assert not [found for step, loss in flat.items() for found in warming.find(seen(step, loss, 1e-5 * step))]
    assert not [found for step, loss in flat.items() for found in decaying.find(seen(step, loss, 1e-3 / step))]


def test_the_state_is_bounded_and_goes_on_after_it_was_restored() -> None:
    losses = power_law(15_000, 10, exponent=0.3, noise=0.02)
    whole, first, second = LossPlateau(CONFIG), LossPlateau(CONFIG), LossPlateau(CONFIG)
    plateau(whole, losses)
    plateau(first, {step: loss for step, loss in losses.items() if step <= 7_770})
    second.restore(first.record())
    plateau(second, {step: loss for step, loss in losses.items() if step > 7_770})
    assert second.record() == whole.record()
    assert len(whole.record()["blocks"]) <= 512


def test_a_rank_is_slow_from_its_share_over_the_median_on() -> None:
    record = {"step": 10, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "slowest_rank": 1}

    def found(ratio: float | None) -> list[Symptom]:
        observation = Observation.of(record | {"slowest_rank_ratio": ratio}, None)
        assert observation is not None
        return list(slow_rank(observation, CONFIG))

    assert not found(1.2) and not found(None)
    (one,) = found(2.0)
    assert (one.rank, one.value, one.layer) == (1, 2.0, None)
