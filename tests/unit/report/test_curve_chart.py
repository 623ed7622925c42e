"""Curves of the page."""

import math
import re

import pytest

from trainer.report.curve_chart import MOST_POINTS, Curve, curve_chart, share_bars


def _points(drawn: str) -> list[tuple[float, float]]:
    path = re.search(r'<path class="s0" d="([^"]+)" data-name', drawn)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[1])]


def test_points_are_where_their_values_are() -> None:
    """Pixels are a linear function of steps and values, higher values above lower ones."""
    steps, values = [0, 10, 40, 100], [4.0, 1.0, 2.5, 2.0]
    points = _points(curve_chart("loss", [Curve(name="a", steps=steps, values=values)]))
    (x0, y0), (x3, y3) = points[0], points[3]
    for (x, y), step, value in zip(points, steps, values, strict=True):
        assert x == pytest.approx(x0 + (x3 - x0) * step / 100, abs=0.11)
        assert y == pytest.approx(y0 + (y3 - y0) * (4.0 - value) / 2.0, abs=0.2)
    assert y0 < y3


def test_a_gap_is_no_line_and_a_value_that_is_not_finite_is_no_point() -> None:
    values = [1.0, 2.0, None, math.inf, 3.0, math.nan]
    drawn = curve_chart("x", [Curve(name="a", steps=range(6), values=values)])
    assert len(re.findall("M", drawn.split('d="', 1)[1].split('"', 1)[0])) == 2
    assert 'data-values="1 2 - - 3"' in drawn
    assert curve_chart("x", [Curve(name="a", steps=[1], values=[math.nan])]) == ""
    assert curve_chart("x", []) == ""


def test_a_long_curve_keeps_its_extremes_and_its_last_value() -> None:
    values = [2.0 + math.sin(step / 50) / 10 for step in range(20_000)]
    values[777], values[12_345], values[-1] = 9.25, -3.5, 1.875
    drawn = curve_chart("x", [Curve(name="a", steps=range(20_000), values=values)])
    data = re.search(r'data-steps="([^"]+)" data-values="([^"]+)"', drawn)
    assert data is not None
    shown = dict(zip(data[1].split(), data[2].split(), strict=True))
    assert len(shown) <= MOST_POINTS
    assert (shown["777"], shown["12345"], shown["19999"]) == ("9.25", "-3.5", "1.875")
    assert list(map(int, shown)) == sorted(map(int, shown))
    assert "<b>1.875</b>" in drawn


def test_the_folded_table_has_the_last_value_of_every_curve() -> None:
    curves = [
        Curve(name="a", steps=range(0, 400, 2), values=[1.5] * 200),
        Curve(name="b", steps=[3, 7], values=[8.0, 6.5]),
    ]
    drawn = curve_chart("x", curves)
    for words in ('data-value="398"', 'data-value="1.5"', 'data-value="7"', 'data-value="6.5"'):
        assert words in drawn


def test_bars_are_as_long_as_their_values() -> None:
    drawn = share_bars("t", ["data", "forward"], [("a", [10.0, 30.0]), ("b", [20.0, 0.0])], unit="ms")
    widths = [float(width) for width in re.findall(r'<rect class="f\d" x="[\d.]+" y="[\d.]+" width="([\d.]+)"', drawn)]
    assert widths == [99.0, 299.0, 199.0, 0.0]  # a pixel less, so that parts stand apart
    assert share_bars("t", ["data"], [("a", [0.0])], unit="ms") == ""
