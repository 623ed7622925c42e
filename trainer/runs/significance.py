"""Welch's t-test, for runs over a few seeds. Imports neither torch nor scipy.

Source: Welch 1947 (Biometrika 34); the distribution of t by the regularised incomplete beta function, whose continued
fraction is evaluated as in Lentz 1976.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_TINY: Final = 1e-300
_MAX_TERMS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference of the means of two samples."""

    mean: float
    """Mean of the second minus mean of the first."""
    standard_error: float | None
    """None with fewer than two values on a side."""
    p: float | None
    """Two-sided probability of a difference at least as large if the means were equal; None if none can be told."""


def error_of_mean(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two samples of unequal variance.

    With one value on a side, or without any spread on both, there is no significance to tell.
    """
    mean = statistics.fmean(second) - statistics.fmean(first)
    errors = error_of_mean(first), error_of_mean(second)
    if errors[0] is None or errors[1] is None:
        return Difference(mean=mean, standard_error=None, p=None)
    a, b = errors[0] ** 2, errors[1] ** 2
    error = math.sqrt(a + b)
    if a + b == 0:
        return Difference(mean=mean, standard_error=error, p=None)
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return Difference(mean=mean, standard_error=error, p=two_sided_p(mean / error, freedom))


def two_sided_p(t: float, freedom: float) -> float:
    """Return the probability that |T| is at least |t|, for Student's T with some degrees of freedom."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t), t * t / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """Return I_x(a, b); `rest` is 1 - x, without the rounding of that difference."""
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    )  # x^a (1-x)^b / B(a, b)
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, rest) / b  # the fraction converges fast below the mean only


def _fraction(a: float, b: float, x: float) -> float:
    """Evaluate the continued fraction of the incomplete beta function."""
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = _nonzero(1 + term / c), 1 / _nonzero(1 + term * d)
            value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return value


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
