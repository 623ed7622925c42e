"""The pictures of the benches, read back as XML."""

from xml.etree import ElementTree

import pytest

from trainer.bench.choices import FACTORS, Choice
from trainer.bench.outcomes import Outcome
from trainer.bench.picture import choices_svg, outcomes_svg
from trainer.moe.yardstick import Measured

NAMESPACE = "{http://www.w3.org/2000/svg}"


def choice(router: str, *, score: float, top_k: int = 2) -> Choice:
    measured = Measured(wanted=10, kept=9, optimum_kept=10, score=score, optimum=1.0)
    at = dict.fromkeys(FACTORS, measured)
    return Choice(
        router=router, logits="random", top_k=top_k, experts_per_token=2.0, load_imbalance=1.0, at=at, call_s=1.0
    )


def outcome(router: str, loss: float, load: float | None, looks_ahead: str = "no") -> Outcome:
    return Outcome(
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
    names = [text for text in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text") if "router_" in (text.text or "")]
    boxes = []
    for text in names:
        width = 6.5 * len(text.text or "")
        x = float(text.get("x") or 0) - (width if text.get("class") == "end" else 0)
        boxes.append((x, float(text.get("y") or 0), width))
    assert len(boxes) == 12 and "unknown" not in svg
    for index, (x, y, width) in enumerate(boxes):
        for other_x, other_y, other_width in boxes[index + 1 :]:
            assert abs(y - other_y) >= 13 or x + width <= other_x or other_x + other_width <= x


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0], []])
def test_axes_have_some_length_whatever_the_numbers(losses: list[float]) -> None:
    svg = outcomes_svg([outcome(f"r{n}", loss, 1.0) for n, loss in enumerate(losses)], title="t")
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(key) or 0) for key in ("width", "height"))
    for point in drawn(svg, "circle", "no"):
        assert 0 < float(point.get("cx") or -1) < width and 0 < float(point.get("cy") or -1) < height
