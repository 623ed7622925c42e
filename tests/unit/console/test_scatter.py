"""Scatter plots."""

import re

import pytest

from trainer.console.scatter import Point, Scatter


def test_ticks_are_round_and_at_their_values() -> None:
    points = [Point(x=6.02e12, y=1.55, name="a"), Point(x=22.3e12, y=1.47, name="b", error=0.01)]
    plot = Scatter(points=points, left=100, top=0, width=400)
    drawn = "\n".join(plot.draw(lambda x: f"{x / 1e12:g}T", "{:g}".format))
    ticks = {float(name): float(x) for x, name in re.findall(r' x="([\d.]+)"[^>]*>([\d.]+)T<', drawn)}
    assert list(ticks) == [5, 10, 15, 20]
    # A point's place by the ticks around it.
    first = min(float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', drawn))
    assert 5 + 5 * (first - ticks[5]) / (ticks[10] - ticks[5]) == pytest.approx(6.02, abs=0.01)
    assert re.findall(r'class="quiet end"[^>]*>(1\.\d+)<', drawn) == ["1.46", "1.48", "1.5", "1.52", "1.54"]
