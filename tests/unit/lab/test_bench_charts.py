"""Pictures of the benchmarks, parsed as XML."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tests.svg_text_boxes import NAMESPACE, Text, outside, overlapping, texts
from trainer.evaluation.routing_optimum import Optimality
from trainer.lab.bench_charts import choices_svg, outcomes_svg
from trainer.lab.router_choices import FACTORS, Choice
from trainer.lab.training_outcomes import TrainingOutcome


def choice(router: str, *, score: float, top_k: int = 2) -> Choice:
    measured = Optimality(wanted=10, kept=9, optimum_kept=10, score=score, optimum=1.0)
    at = dict.fromkeys(FACTORS, measured)
    return Choice(
        router=router, logits="random", top_k=top_k, experts_per_token=2.0, load_imbalance=1.0, at=at, call_s=1.0
    )


def outcome(router: str, loss: float, load: float | None, looks_ahead: str = "no") -> TrainingOutcome:
    return TrainingOutcome(
        router=router,
        held_out_losses=[loss],
        load_imbalance=load,
        drop_rate=None,
        experts_per_token=None,
        expert_width=8,
        step_s=1.0,
        looks_ahead=looks_ahead,
    )


def drawn(svg: str, name: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter(f"{NAMESPACE}{name}") if e.get("class") == kind]


def test_a_bar_is_as_long_as_the_share_that_is_kept() -> None:
    routers = [choice("best", score=1.0), choice("half", score=0.5, top_k=1), choice("nothing", score=0.0)]
    svg = choices_svg(routers, {"random": "a title < that is escaped"}, top_k=2, title="t & t")
    lengths = [float(bar.get("width") or -1) for bar in drawn(svg, "rect", "bar") if bar.get("height") != "12"]
    assert lengths == [lengths[0], lengths[0] / 2, 0] and lengths[0] > 100
    assert ">0.500, k 1<" in svg and ">1.000<" in svg


def test_points_lie_where_their_numbers_say_and_names_cover_nothing() -> None:
    crowd = [outcome(f"router_{n}", 2.0 + 0.001 * (n % 3), 1.0 + 0.01 * (n % 4), "in training") for n in range(12)]
    svg = outcomes_svg([*crowd, outcome("far", 2.5, 3.0), outcome("unknown", 2.2, None)], title="t")
    ahead, (_, far) = drawn(svg, "circle", "ahead")[1:], drawn(svg, "circle", "no")
    assert len(ahead) == 12, "and one in the legend"
    assert float(far.get("cx") or 0) > max(float(point.get("cx") or 0) for point in ahead)
    assert float(far.get("cy") or 0) < min(float(point.get("cy") or 0) for point in ahead), "losses rise upwards"
    names = [text for text in texts(svg) if "router_" in text.words]
    assert len(names) == 12 and "unknown" not in svg
    assert overlapping(svg) == [] and outside(svg) == []
    points = [Text("", float(p.get("cx") or 0) - 5, float(p.get("cy") or 0) - 5, 10, 10) for p in [*ahead, far]]
    assert not [(name.words, point) for name in names for point in points if name.covers(point)]


def test_no_line_crosses_a_name() -> None:
    """Three routers at one point and two near it, from a real training."""
    points = {"expert_choice": (1.0, 1.667), "greedy": (1.0, 1.666), "linear_program": (1.0, 1.667),
              "group_limited": (1.18, 1.668), "bias_balanced": (1.19, 1.661), "sinkhorn": (1.21, 1.679),
              "switch": (1.41, 1.66), "dense": (1.0, 1.613), "hash": (1.98, 1.575), "random": (1.07, 1.96)}  # fmt: skip
    svg = outcomes_svg([outcome(name, loss, load) for name, (load, loss) in points.items()], title="t")
    assert overlapping(svg) == []
    lines = [
        {key: float(line.get(key) or 0) for key in ("x1", "y1", "x2", "y2")} for line in drawn(svg, "line", "axis")
    ]
    assert lines, "a line joins each name to its point"
    for line in lines:
        for part in range(1, 20):
            x, y = (line[f"{axis}1"] + (line[f"{axis}2"] - line[f"{axis}1"]) * part / 20 for axis in "xy")
            on_it = Text("", x, y, 0.1, 0.1)
            assert not [name.words for name in texts(svg) if name.words in points and name.covers(on_it)]


@pytest.mark.parametrize("title", ["t", "a title " * 40])
def test_no_text_of_the_bars_covers_another(title: str) -> None:
    names = ["a_router_of_somebody_with_a_long_name", *(f"router_{n}" for n in range(20))]
    both = [replace(choice(name, score=1.0, top_k=16), logits=kind) for name in names for kind in ("random", "skewed")]
    svg = choices_svg(both, {"random": "x", "skewed": "y"}, top_k=2, title=title)
    assert overlapping(svg) == [] and outside(svg) == []


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0], []])
def test_axes_have_some_length_whatever_the_numbers(losses: list[float]) -> None:
    svg = outcomes_svg([outcome(f"r{n}", loss, 1.0) for n, loss in enumerate(losses)], title="t")
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(key) or 0) for key in ("width", "height"))
    for point in drawn(svg, "circle", "no"):
        assert 0 < float(point.get("cx") or -1) < width and 0 < float(point.get("cy") or -1) < height
