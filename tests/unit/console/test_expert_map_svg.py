"""SVG heat maps of experts by domain, parsed as XML."""

import re
from xml.etree import ElementTree

import pytest

from tests.svg_text_boxes import NAMESPACE, outside, overlapping, texts
from trainer.console.expert_map_svg import expert_map_svg

COUNTS = [[[10, 10, 60, 20], [25, 25, 25, 25]], [[0, 0, 0, 40], [1, 1, 1, 1]]]


def _cells(svg: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    return [rect for rect in root.iter(f"{NAMESPACE}rect") if rect.get("class") == "cell"]


def _said(element: ElementTree.Element) -> str:
    return element.findtext(f"{NAMESPACE}title") or ""


def test_every_layer_domain_and_expert_has_a_cell_with_its_share() -> None:
    cells = _cells(expert_map_svg(COUNTS, ["code", "prose"], ["layer 0", "layer 3"], title="t"))
    assert len(cells) == 2 * 2 * 4
    assert _said(cells[2]) == "code, expert 2: 60.0 % of assignments, 2.40 times the even share"
    assert _said(cells[11]) == "code, expert 3: 100.0 % of assignments, 4.00 times the even share"
    assert len({(cell.get("x"), cell.get("y")) for cell in cells}) == len(cells), "none covers another"


def test_the_same_share_has_the_same_colour_and_the_scale_is_symmetrical_about_even() -> None:
    cells = _cells(expert_map_svg(COUNTS, ["code", "prose"], ["layer 0", "layer 3"], title="t"))
    even = {cell.get("fill") for cell in cells if "1.00 times" in _said(cell)}
    assert even == {"#f0f0ec"}
    assert cells[0].get("fill") == cells[1].get("fill") != cells[3].get("fill")
    assert (cells[8].get("fill"), cells[11].get("fill")) == ("#2166ac", "#b35806")


def test_headings_have_the_mutual_information_of_expert_and_domain() -> None:
    svg = expert_map_svg([[[1, 0], [0, 1]], [[1, 1], [1, 1]]], ["a", "b"], ["layer 1", "layer 2"], title="t")
    assert re.findall(r"share (\S+) of (\S+) bits", svg) == [("1.00", "1.00"), ("0.00", "1.00")]


def test_hostile_names_are_text_and_nothing_else() -> None:
    hostile = "</text><script>alert(1)</script>\x00\x1b&\"'"
    svg = expert_map_svg([[[1, 2], [3, 4]]], [hostile, "b"], [hostile], title=hostile)
    root = ElementTree.fromstring(svg)
    assert not list(root.iter(f"{NAMESPACE}script"))
    shown = hostile.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert root.findtext(f"{NAMESPACE}title") == shown
    assert any(_said(cell).startswith(shown) for cell in _cells(svg))


def test_a_domain_without_tokens_has_a_frame_and_no_cells() -> None:
    svg = expert_map_svg([[[0, 0], [3, 4]]], ["none", "some"], ["layer 0"], title="t")
    assert len(_cells(svg)) == 2
    assert sum(rect.get("class") == "none" for rect in ElementTree.fromstring(svg).iter(f"{NAMESPACE}rect")) == 1


@pytest.mark.parametrize("num_experts", [1, 8, 64, 256])
def test_everything_lies_inside_the_picture(num_experts: int) -> None:
    svg = expert_map_svg(
        [[[1] * num_experts]] * 3, ["a domain of a name that is longer than most"], list("xyz"), title="t"
    )
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(key) or 0) for key in ("width", "height"))
    for rect in root.iter(f"{NAMESPACE}rect"):
        x, y, w, h = (float(rect.get(key) or 0) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for text in root.iter(f"{NAMESPACE}text"):
        if text.get("class") in ("title", "quiet", None):  # the others end, or have their middle, at x
            words = "".join(text.itertext())
            assert float(text.get("x") or 0) + 6.5 * len(words) <= width, words


@pytest.mark.parametrize(
    ("num_experts", "num_domains"), [(1, 12), (2, 1), (8, 12), (16, 12), (64, 3), (256, 3), (1000, 1)]
)
def test_no_text_covers_another_or_leaves_the_picture(num_experts: int, num_domains: int) -> None:
    """Scale, expert indices, domains and shares under a long title."""
    domains = [f"wmt14-de-en.{'very-' * 9}long-name.part-{number:05d}" for number in range(num_domains)]
    counts = [[[1.0 + (row == expert) * 1e6 for expert in range(num_experts)] for row in range(num_domains)]] * 2
    svg = expert_map_svg(counts, domains, ["layer 0", "layer 127"], title="run." * 32 + ": 1000000 steps done")
    assert overlapping(svg) == [] and outside(svg) == []
    assert len({text.words for text in texts(svg) if text.words.startswith("wmt14")}) == num_domains, "names differ"


def test_the_scale_has_a_label_under_each_of_its_colours() -> None:
    svg = expert_map_svg(COUNTS, ["code", "prose"], ["layer 0", "layer 3"], title="t")
    scale = [rect for rect in ElementTree.fromstring(svg).iter(f"{NAMESPACE}rect") if rect.get("class") == "scale"]
    labels = [text for text in texts(svg) if text.words.endswith("x")]
    assert [label.words for label in labels] == ["<=0.25x", "0.5x", "1x", "2x", ">=4x"]
    for rect, label in zip(scale, labels, strict=True):
        x, width = (float(rect.get(key) or 0) for key in ("x", "width"))
        assert x <= label.x and label.x + label.width <= x + width
