"""Numbers formatted for people."""

import math

import pytest

from trainer.console import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (812, "812"), (999.4, "999"), (999.6, "1.00k"), (1234, "1.23k"), (45_210, "45.2k"), (99_960, "100k"),
        (1_250_000, "1.25M"), (3.2e9, "3.20G"), (5e15, "5.00P"), (5e21, "5000E"), (-1234, "-1.23k"), (math.nan, "nan"),
        (None, "-"),
    ],
)  # fmt: skip
def test_rates_have_three_figures(value: float | None, text: str):
    assert formatting.rate(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (190, "3m 10s"), (3600, "1h 00m"), (7530, "2h 05m"),
        (385_200, "4d 11h"), (-3, "0s"), (math.inf, "-"), (math.nan, "-"), (None, "-"),
    ],
)  # fmt: skip
def test_durations_name_their_two_largest_units(seconds: float | None, text: str):
    assert formatting.duration(seconds) == text


def test_sizes_are_decimal():
    assert [formatting.size(n) for n in (812, 45_210, 1_250_000_000)] == ["812 B", "45.2 kB", "1.25 GB"]


@pytest.mark.parametrize("form", [formatting.number, formatting.percent, formatting.ratio, formatting.learning_rate])
def test_none_is_a_dash_and_non_finite_numbers_are_named(form):
    assert form(None) == "-"
    assert "nan" in form(math.nan)
