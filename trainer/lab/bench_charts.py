"""Draw the router benchmarks as SVG pictures."""

import math
from collections.abc import Iterator, Mapping, Sequence

from trainer.console.scatter import Point, Scatter
from trainer.console.svg import MARGIN, ROW, circle, document, line, rect, text, text_width
from trainer.lab.logits import LogitsKind
from trainer.lab.router_choices import FACTORS, Choice
from trainer.lab.training_outcomes import TrainingOutcome

_MIN_NAME, _PANEL, _GAP = 130, 210, 24
_VALUE = 88  # width of the number beside a bar, in pixels


def choices_svg(choices: Sequence[Choice], titles: Mapping[LogitsKind, str], *, top_k: int, title: str) -> str:
    """Return an SVG of the share of the best score each router keeps: a panel for each kind of logits, a row for each.

    Routers whose k is not `top_k` are marked with theirs.
    """
    routers = list(dict.fromkeys(choice.router for choice in choices))
    left, top = MARGIN + math.ceil(max(_MIN_NAME, *(text_width(router) + 8 for router in routers))), 104
    bottom = top + len(routers) * ROW
    body = [text(MARGIN, 48, "share of the best total score that is kept", "quiet")]
    for index, (style, factor) in enumerate(zip(("bar", "more"), FACTORS, strict=True)):
        x = MARGIN + index * 180
        body += [rect(x, 60, 12, 12, style), text(x + 18, 70, f"capacity factor {factor:g}", "quiet")]
    body += [text(left - 8, top + row * ROW + 15, router, "end") for row, router in enumerate(routers)]
    for index, (kind, panel) in enumerate(titles.items()):
        by_router = {choice.router: choice for choice in choices if choice.logits == kind}
        x = left + index * (_PANEL + _VALUE + _GAP)
        body.append(text(x, top - 10, kind, "bold", tooltip=panel))
        for row, router in enumerate(routers):
            body += _bars(by_router[router], top_k, x=x, y=top + row * ROW)
        body.append(line(x, top, x, bottom, "axis"))
    width = left + len(titles) * (_PANEL + _VALUE + _GAP)
    return document(body, title=title, width=width, height=bottom + MARGIN)


def _bars(choice: Choice, top_k: int, *, x: int, y: int) -> Iterator[str]:
    """Draw a router's bar at capacity factor 1 over its bar at the larger factor."""
    fair, more = (1 - choice.at[factor].gap for factor in FACTORS)
    tooltip = f"{choice.router}: {fair:.4f} at {FACTORS[0]:g}, {more:.4f} at {FACTORS[1]:g}"
    own_k = "" if choice.top_k == top_k else f", k {choice.top_k}"
    yield rect(x, y + 4, _PANEL * more, ROW - 8, "more", tooltip=tooltip)
    yield rect(x, y + 4, _PANEL * fair, ROW - 8, "bar", tooltip=tooltip)
    yield text(x + _PANEL * max(fair, more) + 6, y + 15, f"{fair:.3f}{own_k}", "quiet")


def outcomes_svg(outcomes: Sequence[TrainingOutcome], *, title: str) -> str:
    """Return an SVG of held-out loss over load imbalance: a point for each router, joined to its name on the right.

    Routers without a load imbalance are left out.
    """
    points = [
        Point(
            x=one.load_imbalance,
            y=one.held_out_loss,
            name=one.router,
            style="no" if one.looks_ahead == "no" else "ahead",
            tooltip=f"{one.router}: held-out loss {one.held_out_loss:.4f}, imbalance {one.load_imbalance:.2f}",
        )
        for one in outcomes
        if one.load_imbalance is not None
    ]
    x_title = "load of the busiest expert over the mean: 1 is even"
    plot = Scatter(points=points, left=MARGIN + 50, top=96, x_title=x_title)
    body = [
        text(MARGIN, 48, "held-out loss, nats per token: lower is better", "quiet"),
        circle(MARGIN + 6, 66, "no"),
        text(MARGIN + 18, 70, "causal", "quiet"),
        circle(MARGIN + 186, 66, "ahead"),
        text(MARGIN + 198, 70, "looks ahead in training", "quiet"),
        *plot.draw(lambda load: f"{load:.2f}", lambda loss: f"{loss:.3f}"),
    ]
    return document(body, title=title, width=plot.right + MARGIN, height=plot.bottom + 60)
