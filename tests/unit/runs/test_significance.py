"""Tests for Welch's t-test, against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from trainer.runs.significance import error_of_mean, two_sided_p, welch


@pytest.mark.parametrize("freedom", [1.0, 1.7, 2.0, 3.5, 10.0, 333.3, 1e5])
def test_the_tails_of_t_equal_those_of_scipy(freedom: float) -> None:
    for t in (0.0, 1e-9, 0.01, 0.5, 1.0, 2.3, 9.0, 80.0, -2.3):
        expected = 2 * stats.t.sf(abs(t), freedom)
        assert math.isclose(two_sided_p(t, freedom), expected, rel_tol=1e-9, abs_tol=1e-14)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (2, 40), (30, 30)])
@pytest.mark.parametrize("spreads", [(1.0, 1.0), (0.01, 3.0)])
def test_welch_equals_that_of_scipy(sizes: tuple[int, int], spreads: tuple[float, float]) -> None:
    rng = np.random.default_rng(sum(sizes))
    for shift in (0.0, 0.3, 5.0):
        first, second = (rng.normal(0, spreads[0], sizes[0]), rng.normal(shift, spreads[1], sizes[1]))
        found = welch(first.tolist(), second.tolist())
        expected = stats.ttest_ind(second, first, equal_var=False)
        assert found.p is not None and found.standard_error is not None
        assert math.isclose(found.p, expected.pvalue, rel_tol=1e-9)
        assert math.isclose(found.mean / found.standard_error, expected.statistic, rel_tol=1e-9)
        assert math.isclose(error_of_mean(first.tolist()) or 0, stats.sem(first), rel_tol=1e-12)


def test_one_seed_or_no_spread_tells_no_significance() -> None:
    assert (welch([1.0], [2.0, 3.0]).p, welch([1.0], [2.0, 3.0]).mean) == (None, 1.5)
    assert (welch([1.0, 1.0], [2.0, 2.0]).p, welch([1.0, 1.0], [2.0, 2.0]).standard_error) == (None, 0)
    assert error_of_mean([1.0]) is None
