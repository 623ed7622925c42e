"""Heat maps of experts by domain on the terminal."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from trainer.console.expert_map import expert_map
from trainer.console.style import SHADES


def test_heat_map_shades_by_share_of_the_domain_against_the_even_share():
    # Even is 25 of 100: 0.2x, 0.6x, 1x and 2.2x.
    text = _shown(expert_map([[[5, 15, 25, 55]]], ["prose"], ["layer 3"], width=80), 80)
    far_below, below, even, _, far_above = SHADES
    assert f"prose  {far_below * 2}{below * 2}{even * 2}{far_above * 2}\n" in text
    assert "layer 3  0.00 bits" in text
    assert "even is 1/4" in text


def test_heat_map_does_not_depend_on_how_much_text_a_domain_has():
    picture = expert_map([[[1, 3], [1000, 3000]]], ["ab", "cd"], ["layer 0"], width=80)
    rows = [line.split()[1] for line in _shown(picture, 80).splitlines() if line[:2] in ("ab", "cd")]
    assert rows[0] == rows[1]


def test_heat_map_marks_a_domain_without_tokens():
    assert "no tokens" in _shown(expert_map([[[0, 0], [1, 2]]], ["a", "b"], ["layer 0"], width=80), 80)


def test_heat_map_of_many_layers_shows_an_even_selection_with_first_and_last():
    names = [f"layer {i}" for i in range(24)]
    text = _shown(expert_map([[[1, 2], [2, 1]]] * 24, ["a", "b"], names, width=80), 80)
    assert "8 of 24 MoE layers" in text
    assert "layer 0 " in text and "layer 23 " in text and text.count(" bits") == 8


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
@pytest.mark.parametrize("num_experts", [1, 7, 8, 16, 17, 64, 256])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_heat_map_shows_every_expert_within_the_width(width: int, num_experts: int, num_layers: int):
    counts = [[[9] * num_experts, [9] * num_experts] for _ in range(num_layers)]
    domains = ["prose", "\u65e5\u672c\u8a9e\u306e\u3068\u3066\u3082\u9577\u3044"]
    text = _shown(expert_map(counts, domains, [f"layer {i}" for i in range(num_layers)], width=width), width)
    assert max(map(cell_len, text.splitlines())) <= width
    cells = 2 if num_experts <= 16 else 1
    prose = "".join(line for line in text.splitlines() if line.startswith("prose"))
    assert prose.count(SHADES[2]) == num_layers * num_experts * cells


def _shown(renderable: object, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
