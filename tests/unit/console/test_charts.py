"""Sparkline and loss chart."""

import math

from hypothesis import given
from hypothesis import strategies as st

from trainer.console.charts import loss_chart, sparkline
from trainer.console.style import LEVELS

values = st.lists(st.none() | st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=50)


def test_sparkline_runs_from_the_lowest_block_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == LEVELS[1:]
    assert sparkline([7, 0], 8) == LEVELS[8] + LEVELS[1]


def test_sparkline_averages_what_does_not_fit():
    assert sparkline([0, 2, 10, 12], 2) == sparkline([1, 11], 2)


def test_sparkline_of_equal_values_is_flat():
    assert len(set(sparkline([3.0] * 5, 5))) == 1


def test_sparkline_leaves_a_gap_where_there_is_no_value():
    line = sparkline([1.0, None, math.nan, 2.0], 4)
    assert [c == " " for c in line] == [False, True, True, False]
    assert sparkline([None, math.inf], 4) == "  "
    assert sparkline([], 4) == ""


@given(values, st.integers(0, 40))
def test_sparkline_never_exceeds_its_width(numbers, width):
    assert len(sparkline(numbers, width)) == min(width, len(numbers))


def test_chart_names_the_extremes_and_the_steps():
    lines = loss_chart([10, 1000, 2000], [5.25, 3.5, 1.75], 60, 8).plain.splitlines()
    assert lines[0].startswith("5.25 ") and lines[-2].startswith("1.75 ")
    assert lines[-1].split() == ["10", "2,000", "steps"]


def test_chart_of_a_falling_loss_falls():
    lines = loss_chart(range(100), [math.exp(-s / 20) for s in range(100)], 60, 8).plain.splitlines()[:-1]
    heights = [sum(len(line) > column and line[column] != " " for line in lines) for column in range(6, 60)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == len(lines) and heights[-1] == 1


def test_chart_places_values_by_step_and_fills_steps_without_record():
    # A single late record must not take half of the picture.
    lines = loss_chart([0, 1, 2, 100], [1.0, 1.0, 1.0, 2.0], 56, 4).plain.splitlines()
    full = [line.count(LEVELS[-1]) for line in lines[:-1]]
    assert full[0] < 20 < full[-1]


def test_chart_leaves_a_gap_where_nothing_was_finite():
    bottom = loss_chart(range(10), [2.0, 2.0, *[math.nan] * 6, 1.0, 1.0], 16, 4).plain.splitlines()[-2]
    assert "      " in bottom[6:]


@given(values, st.integers(30, 120), st.integers(3, 12))
def test_chart_keeps_to_its_size(numbers, width, height):
    lines = loss_chart(range(len(numbers)), numbers, width, height).plain.split("\n")
    assert len(lines) in (1, height)  # 1: the sentence that there is nothing to draw
    assert max(map(len, lines)) <= width


def test_chart_of_a_damaged_log_places_values_by_step():
    steps, values = [1, 2, 3, 4, 5], [5.0, 4.0, 3.0, 2.0, 1.0]
    chart = loss_chart(steps, values, 40, 6).plain
    assert loss_chart(steps[::-1], values[::-1], 40, 6).plain == chart
    last_line = loss_chart([9, 2, 3, 4, 5], values, 40, 6).plain.splitlines()[-1]
    assert last_line.split() == ["2", "9", "steps"]
