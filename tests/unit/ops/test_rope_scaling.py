"""Scaled frequencies by their defining properties; against transformers: tests/unit/models/test_rotary_embedding.py."""

import math

import pytest
import torch

from trainer.ops.rope_scaling import dynamic_ntk_theta, llama3_rates, yarn_mscale, yarn_rates
from trainer.ops.rotary import rotary_rates

# r rotated width of a head.

LENGTH = 4096


def _turns(rates: torch.Tensor) -> torch.Tensor:
    return LENGTH * rates / (2 * math.pi)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_pairs_divides_slow_ones_and_goes_from_one_to_the_other(truncate: bool) -> None:
    rates = rotary_rates(64, 150000.0)
    options = {"factor": 32.0, "original_length": LENGTH, "beta_fast": 32.0, "beta_slow": 1.0}
    scaled = yarn_rates(rates, 150000.0, truncate=truncate, **options)
    share, turns = scaled / rates, _turns(rates)
    clearly = 2.2 if truncate else 1.0  # rounding moves a bound by less than a pair, 1.45 times the turns
    torch.testing.assert_close(share[turns > 32 * clearly], torch.ones_like(share)[turns > 32 * clearly])
    assert (share[turns < 1 / clearly] - 1 / 32).abs().max() < 1e-15
    between = share[(turns > 1.1) & (turns < 29)]
    assert len(between) > 5 and (between.diff() < 0).all() and between.min() > 1 / 32 and between.max() < 1


def test_llama3_is_linear_in_turns_between_its_bounds() -> None:
    rates = rotary_rates(128, 500000.0)
    scaled = llama3_rates(rates, factor=8.0, original_length=LENGTH, low_freq_factor=1.0, high_freq_factor=4.0)
    for share, turns in zip((scaled / rates).tolist(), _turns(rates).tolist(), strict=True):
        kept = min(1.0, max(0.0, (turns - 1) / 3))
        assert share == pytest.approx((1 - kept) / 8 + kept, abs=1e-14)


def test_the_slowest_pair_turns_over_a_longer_text_as_it_did_over_the_original() -> None:
    theta, width = 10000.0, 8
    stretched = dynamic_ntk_theta(theta, width, factor=1.0, original_length=100, length=300)
    before, after = rotary_rates(width, theta), rotary_rates(width, stretched)
    assert float(after[-1]) * 300 == pytest.approx(float(before[-1]) * 100, rel=1e-14)
    assert float(after[0]) == float(before[0]) == 1, "the fastest stays"
    assert dynamic_ntk_theta(theta, width, factor=4.0, original_length=100, length=100) == theta
    assert dynamic_ntk_theta(theta, width, factor=4.0, original_length=100, length=30) == theta, "never shorter"


def test_attention_is_sharper_over_longer_texts() -> None:
    assert yarn_mscale(1.0) == 1
    assert yarn_mscale(math.exp(10)) == 2 and yarn_mscale(math.exp(10), 0.5) == 1.5
