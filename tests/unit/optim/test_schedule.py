"""Learning rates at the steps that matter."""

import pytest

from trainer.optim.registry import WarmupCosineConfig, WarmupStableDecayConfig
from trainer.optim.schedule import default_warmup


def test_warmup_rises_to_the_peak_and_the_cosine_ends_at_its_final_fraction() -> None:
    lr = WarmupCosineConfig(peak_lr=1.0, warmup_steps=10, final_fraction=0.1).build(total_steps=111)
    assert [lr(0), lr(4), lr(9), lr(10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert lr(60) == pytest.approx(0.55)  # half way: the mean of peak and end
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
    assert [default_warmup(n) for n in (1, 9, 40, 1000, 10**6)] == [0, 0, 4, 100, 100]
    assert WarmupCosineConfig(peak_lr=1.0).build(total_steps=40)(3) == 1.0
