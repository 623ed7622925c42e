"""Heat maps and flows of the page."""

import re

import pytest

from trainer.report.flow_chart import flow_chart, strongest_flows
from trainer.report.heat_chart import MOST_CELLS, HeatMap, heat_chart, scale_step
from trainer.report.page_colours import HALF_STEPS
from trainer.report.report_data import LayerFlow


def test_the_scale_has_its_middle_where_it_says() -> None:
    assert [scale_step(value, 0.25, "even_share") for value in (0, 0.0625, 0.25, 1.0)] == [
        0,
        0,
        HALF_STEPS,
        2 * HALF_STEPS,
    ]
    assert [scale_step(value, 0, "signed") for value in (-1, 0, 1)] == [0, HALF_STEPS, 2 * HALF_STEPS]
    assert [scale_step(value, 0, "share") for value in (0, 0.5, 1)] == [HALF_STEPS, 9, 2 * HALF_STEPS]


def test_a_map_has_every_value_and_names_what_is_missing() -> None:
    heat = HeatMap(title="t", rows=["r", "q"], columns=["0", "1"], values=[[0.123456, None], [1.0, 0.5]], scale="share")
    drawn = heat_chart(heat)
    assert re.findall(r'title="([\d.]+)">(\d+)<', drawn) == [("12.35", "12"), ("100.00", "100"), ("50.00", "50")]
    assert drawn.count("<td>-</td>") == 1


def test_a_map_that_is_too_large_is_left_to_the_json() -> None:
    size = int(MOST_CELLS**0.5) + 1
    names = [str(index) for index in range(size)]
    drawn = heat_chart(HeatMap(title="t", rows=names, columns=names, values=[[0.5] * size] * size, scale="share"))
    assert "the JSON has them" in drawn
    assert len(drawn) < 500


def test_flows_of_independent_layers_are_at_chance() -> None:
    counts = tuple(tuple(a * b for b in (1.0, 2.0, 5.0)) for a in (3.0, 1.0))
    flow = LayerFlow(layer=0, next_layer=1, counts=counts, mutual_information=0.0)
    assert [lift for *_, lift in strongest_flows(flow, 9)] == pytest.approx([1.0] * 6, abs=1e-12)
    assert not re.search(r"band f\d", flow_chart([flow]))


def test_a_flow_above_chance_is_coloured_and_first() -> None:
    flow = LayerFlow(layer=2, next_layer=4, counts=((9.0, 1.0), (1.0, 9.0)), mutual_information=0.53)
    assert strongest_flows(flow, 1) == [(0, 0, 0.9, pytest.approx(1.8))]
    drawn = flow_chart([flow])
    assert len(re.findall(r"band f\d", drawn)) == 2
    assert len(re.findall("band faint", drawn)) == 2
    assert "layer 2 expert 0 to layer 4 expert 0: 90.0 %, 1.80 x chance" in drawn


def test_bands_fill_the_experts_that_they_join() -> None:
    """The bands into an expert are together as high as it is."""
    flow = LayerFlow(layer=0, next_layer=1, counts=((4.0, 1.0), (2.0, 3.0)), mutual_information=0.1)
    drawn = flow_chart([flow])
    heights = [float(height) for height in re.findall(r'<rect class="f\d" [^>]*height="([\d.]+)"', drawn)]
    into = [float(height) for height in re.findall(r"[\d.]+v([\d.]+)C", drawn)]
    assert sum(into) == pytest.approx(sum(heights[2:]), abs=0.3)
    assert sum(heights[:2]) == pytest.approx(sum(heights[2:]), abs=0.2)
