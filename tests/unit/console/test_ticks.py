"""Values along an axis."""

import pytest

from trainer.console.ticks import nice_ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.86, 5.58), (-0.02, 0.013), (0, 160), (3, 3), (1e-9, 2e9)])
def test_ticks_are_round_and_within_their_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-9 * abs(high) <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert high == low or len(ticks) >= 2
