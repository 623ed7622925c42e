"""The benches of routers as pictures of their own: SVGs that need nothing else, light and dark."""

import math
from collections.abc import Iterator, Mapping, Sequence

from trainer.console.svg import document, text, text_width
from trainer.lab.label_placement import Box, place_labels
from trainer.lab.logits import LogitsKind
from trainer.lab.router_choices import FACTORS, Choice
from trainer.lab.training_outcomes import TrainingOutcome

_MARGIN, _NAME, _ROW, _PANEL, _GAP = 16, 130, 22, 210, 24
_VALUE = 88
"""Width of what is written behind a bar."""
_PLOT = (560, 380)
_TICKS = 5
_STYLE = """
svg { background: #ffffff; font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 } .panel { font-weight: 600 } .quiet { fill: #59636e }
.end { text-anchor: end } .middle { text-anchor: middle } .bar { fill: #2166ac } .more { fill: #a8c6e5 }
.axis { stroke: #8c959f } .grid { stroke: #d1d9e0 } .no { fill: #2166ac; stroke: #2166ac }
.ahead { fill: #ffffff; stroke: #b35806; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117; fill: #e6edf3 } .quiet { fill: #9198a1 } .bar { fill: #6cb6ff } .more { fill: #2c4f73 }
  .axis { stroke: #656c76 } .grid { stroke: #2a313c } .no { fill: #6cb6ff; stroke: #6cb6ff }
  .ahead { fill: #0d1117; stroke: #f0883e }
}
"""


def choices_svg(choices: Sequence[Choice], titles: Mapping[LogitsKind, str], *, top_k: int, title: str) -> str:
    """Draw what share of the best score each router keeps: a panel for each kind of logits, a row for each router.

    Args:
        choices: of all kinds, with the same routers each.
        titles: of the panels, by kind.
        top_k: k; routers that have another one say so.
        title: the first line.

    Returns:
        The text of an SVG file.
    """
    routers = list(dict.fromkeys(choice.router for choice in choices))
    left, top = _MARGIN + math.ceil(max(_NAME, *(text_width(router) + 8 for router in routers))), 104
    body = [f'<text class="quiet" x="{_MARGIN}" y="48">share of the best sum of scores that is kept</text>']
    for index, (style, factor) in enumerate(zip(("bar", "more"), FACTORS, strict=True)):
        x = _MARGIN + index * 180
        body.append(f'<rect class="{style}" x="{x}" y="60" width="12" height="12"/>')
        body.append(
            f'<text class="quiet" x="{x + 18}" y="70">room for {factor:g} fair share{"s" if factor != 1 else ""}</text>'
        )
    for row, router in enumerate(routers):
        body.append(f'<text class="end" x="{left - 8}" y="{top + row * _ROW + 15}">{text(router)}</text>')
    for index, (kind, panel) in enumerate(titles.items()):
        of_kind = {choice.router: choice for choice in choices if choice.logits == kind}
        x = left + index * (_PANEL + _VALUE + _GAP)
        body.append(f'<text class="panel" x="{x}" y="{top - 10}">{text(kind)}<title>{text(panel)}</title></text>')
        for row, router in enumerate(routers):
            body += _bars(of_kind[router], top_k, x=x, y=top + row * _ROW)
        body.append(f'<line class="axis" x1="{x}" y1="{top}" x2="{x}" y2="{top + len(routers) * _ROW}"/>')
    width = left + len(titles) * (_PANEL + _VALUE + _GAP)
    height = top + len(routers) * _ROW + _MARGIN
    return document(body, title=title, style=_STYLE, margin=_MARGIN, width=width, height=height)


def _bars(choice: Choice, top_k: int, *, x: int, y: int) -> Iterator[str]:
    """Draw one router's bar, and behind it what more room would keep."""
    fair, more = (1 - choice.at[factor].gap for factor in FACTORS)
    said = f"{choice.router}: {fair:.4f} at {FACTORS[0]:g}, {more:.4f} at {FACTORS[1]:g}"
    own_k = "" if choice.top_k == top_k else f", k {choice.top_k}"
    yield f"<g><title>{text(said)}</title>"
    yield f'<rect class="more" x="{x}" y="{y + 4}" width="{_PANEL * more:.1f}" height="{_ROW - 8}"/>'
    yield f'<rect class="bar" x="{x}" y="{y + 4}" width="{_PANEL * fair:.1f}" height="{_ROW - 8}"/></g>'
    yield f'<text class="quiet" x="{x + _PANEL * max(fair, more) + 6:.1f}" y="{y + 15}">{fair:.3f}{own_k}</text>'


def outcomes_svg(outcomes: Sequence[TrainingOutcome], *, title: str) -> str:
    """Draw held-out loss over the imbalance of the experts: a point with its name for each router.

    Args:
        outcomes: those without a number for the load are left out.
        title: the first line.

    Returns:
        The text of an SVG file.
    """
    points = [(one, one.load_imbalance) for one in outcomes if one.load_imbalance is not None]
    losses, loads = [one.held_out_loss for one, _ in points], [load for _, load in points]
    low_x, high_x = _around(loads)
    low_y, high_y = _around(losses)
    left, top, (width, height) = _MARGIN + 50, 96, _PLOT
    body = [
        f'<text class="quiet" x="{_MARGIN}" y="48">held-out loss, nats per token: lower is better</text>',
        f'<circle class="no" cx="{_MARGIN + 6}" cy="66" r="5"/>',
        f'<text class="quiet" x="{_MARGIN + 18}" y="70">looks at no later token</text>',
        f'<circle class="ahead" cx="{_MARGIN + 186}" cy="66" r="5"/>',
        f'<text class="quiet" x="{_MARGIN + 198}" y="70">looks ahead in training</text>',
        f'<text class="quiet end" x="{left + width}" y="{top + height + 42}">load of the busiest expert over the mean: '
        "1 is even</text>",
    ]
    for tick in range(_TICKS + 1):
        x, y = left + width * tick / _TICKS, top + height * tick / _TICKS
        body.append(f'<line class="grid" x1="{x:g}" y1="{top}" x2="{x:g}" y2="{top + height}"/>')
        body.append(f'<line class="grid" x1="{left}" y1="{y:g}" x2="{left + width}" y2="{y:g}"/>')
        at_x, at_y = low_x + (high_x - low_x) * tick / _TICKS, high_y + (low_y - high_y) * tick / _TICKS
        body.append(f'<text class="quiet middle" x="{x:g}" y="{top + height + 18}">{at_x:.2f}</text>')
        body.append(f'<text class="quiet end" x="{left - 8}" y="{y + 4:g}">{at_y:.3f}</text>')
    places = {
        one.router: (
            left + width * (load - low_x) / (high_x - low_x),
            top + height * (high_y - one.held_out_loss) / (high_y - low_y),
        )
        for one, load in points
    }
    margins = [Box(0, 0, 10_000, top - 8), Box(0, top + height + 4, 10_000, 48)]  # the legend; numbers of the axis
    drawn = [Box(x - 6, y - 6, 12, 12) for x, y in places.values()]
    labels = place_labels(places, {name: text_width(name) for name in places}, [*margins, *drawn], least_x=left)
    for one, load in points:
        (x, y), label = places[one.router], labels[one.router]
        if label.line is not None:
            ends = 'x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"'.format(*label.line)
            body.append(f'<line class="axis" {ends}/>')
        style, end = ("no" if one.looks_ahead == "no" else "ahead"), (' class="end"' if label.is_left else "")
        said = text(f"{one.router}: held-out loss {one.held_out_loss:.4f}, imbalance {load:.2f}")
        body.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{said}</title></circle>')
        near = label.box.x + (label.box.width if label.is_left else 0)
        body.append(f'<text{end} x="{near:.1f}" y="{label.box.y + 11:.1f}">{text(one.router)}</text>')
    inside = [*drawn, *(label.box for label in labels.values())]
    return document(
        body,
        title=title,
        style=_STYLE,
        margin=_MARGIN,
        width=max([left + width + _MARGIN, *(box.x + box.width for box in inside)]) + _MARGIN,
        height=max([top + height + 60, *(box.y + box.height + _MARGIN for box in inside)]),
    )


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis that shows all values with some air."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    air = 0.08 * (high - low) or 0.05
    return low - air, high + air
