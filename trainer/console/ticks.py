"""Round values along the axis of a chart."""

import math


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round values between two, at most `most` + 1 of them."""
    span = high - low
    if span < 1e-300 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= span * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
