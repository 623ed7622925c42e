"""Curves and heat maps."""

import io
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from trainer.console.glyphs import ASCII, UNICODE
from trainer.console.pictures import expert_by_domain, loss_chart, sparkline

values = st.lists(st.none() | st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=50)


def test_sparkline_runs_from_the_lowest_block_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == UNICODE.levels[1:]
    assert sparkline([7, 0], 8) == UNICODE.levels[8] + UNICODE.levels[1]


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
    full = [line.count(UNICODE.levels[-1]) for line in lines[:-1]]
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


def test_chart_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="2 steps and 1 values"):
        loss_chart([1, 2], [1.0], 40, 5)


def test_ascii_pictures_are_ascii():
    numbers = [random.Random(i).random() for i in range(30)]
    assert sparkline(numbers, 20, glyphs=ASCII).isascii()
    assert loss_chart(range(30), numbers, 40, 6, glyphs=ASCII).plain.isascii()
    assert _shown(expert_by_domain([[[3, 1], [1, 3]]], ["a", "b"], ["layer 0"]), 60, encoding="ascii").isascii()


def test_heat_map_shades_by_share_of_the_domain_against_the_even_share():
    # Even is 25 of 100: 0.2x, 0.6x, 1x and 2.2x.
    text = _shown(expert_by_domain([[[5, 15, 25, 55]]], ["prose"], ["layer 3"]), 80)
    far_below, below, even, _, far_above = UNICODE.shades
    assert f"prose  {far_below * 2}{below * 2}{even * 2}{far_above * 2}\n" in text
    assert "layer 3  0.00 bits" in text
    assert "even is 1/4" in text


def test_heat_map_does_not_depend_on_how_much_text_a_domain_has():
    picture = expert_by_domain([[[1, 3], [1000, 3000]]], ["ab", "cd"], ["layer 0"])
    rows = [line.split()[1] for line in _shown(picture, 80).splitlines() if line[:2] in ("ab", "cd")]
    assert rows[0] == rows[1]


def test_heat_map_says_where_a_domain_has_no_tokens():
    assert "no tokens" in _shown(expert_by_domain([[[0, 0], [1, 2]]], ["a", "b"], ["layer 0"]), 80)


def test_heat_map_of_many_layers_shows_an_even_selection_with_first_and_last():
    names = [f"layer {i}" for i in range(24)]
    text = _shown(expert_by_domain([[[1, 2], [2, 1]]] * 24, ["a", "b"], names, max_layers=4), 80)
    assert "4 of 24 MoE layers" in text
    assert "layer 0 " in text and "layer 23 " in text and text.count(" bits") == 4


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
@pytest.mark.parametrize("num_experts", [1, 7, 8, 16, 17, 64, 256])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_heat_map_shows_every_expert_within_the_width(width: int, num_experts: int, num_layers: int):
    counts = [[[9] * num_experts, [9] * num_experts] for _ in range(num_layers)]
    domains = ["prose", "\u65e5\u672c\u8a9e\u306e\u3068\u3066\u3082\u9577\u3044"]
    text = _shown(expert_by_domain(counts, domains, [f"layer {i}" for i in range(num_layers)]), width)
    assert max(map(cell_len, text.splitlines())) <= width
    cells = 2 if num_experts <= 16 else 1
    prose = "".join(line for line in text.splitlines() if line.startswith("prose"))
    assert prose.count(UNICODE.shades[2]) == num_layers * num_experts * cells


def test_heat_map_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\).*with 1 layers and 1 domains"):
        expert_by_domain([[[1, 2], [2, 1]]], ["a"], ["layer 0"])


def _shown(renderable: object, width: int, *, encoding: str = "utf-8") -> str:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding)
    Console(file=file, width=width, color_system=None).print(renderable)
    file.flush()
    return "\n".join(line.rstrip() for line in buffer.getvalue().decode(encoding).splitlines()) + "\n"
