"""Scaling of rotary frequencies, for texts longer than those that a model learned before.

A scaled model turns its pairs more slowly, so that the angles of a longer text stay within those it knows. The rules
are those of transformers, in float64.

# r rotated width of a head.
"""

import math

import torch
from torch import Tensor


def dynamic_ntk_theta(theta: float, width: int, *, factor: float, original_length: int, length: int) -> float:
    """Return the base whose slowest pair turns as far over `length` tokens as it did over the original length."""
    growth = factor * max(length, original_length) / original_length - (factor - 1)
    return theta * growth ** (width / (width - 2))


def yarn_rates(
    rates: Tensor,
    theta: float,
    *,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Tensor:
    """Return rates (r/2,): the slow ones divided by factor, the fast ones kept, between them a ramp over the pairs.

    #  pair     0   ...  first          last  ...  r/2 - 1
    #  divided  0    0     0    .. ..     1     1     1
    """
    width = 2 * len(rates)

    def pair(turns: float) -> float:
        """Return the pair, a real number, that makes so many turns in the original length."""
        return width * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = pair(beta_fast), pair(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    # Pairs end at r/2 - 1, but the published rule clips at r - 1: models were trained with that ramp.
    first, last = max(first, 0), min(last, width - 1)
    number = torch.arange(len(rates), device=rates.device, dtype=rates.dtype)
    divided = ((number - first) / (last - first or 0.001)).clamp(0, 1)
    return rates / factor * divided + rates * (1 - divided)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """Return 0.1 * weight * ln(factor) + 1, by which YaRN sharpens attention over longer texts."""
    return 0.1 * weight * math.log(factor) + 1.0


def llama3_rates(
    rates: Tensor, *, factor: float, original_length: int, low_freq_factor: float, high_freq_factor: float
) -> Tensor:
    """Return rates (r/2,): divided by factor below low_freq_factor turns in the original length, kept above the high.

    Between both, interpolated by the number of turns.
    """
    turns = original_length * rates / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return rates / factor * (1 - kept) + rates * kept
