"""Draw how tokens go from the experts of each MoE layer to those of the next, as bands in one SVG.

# E experts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from trainer.console.svg import text
from trainer.report.markup import figure, quoted
from trainer.report.report_data import LayerFlow

MOST_BANDED: Final = 16
"""Experts of a layer that are told apart as bands; more are drawn as heat maps."""
STRONG: Final = 1.5
"""Times what independent layers would give, from which on a band has its expert's colour."""
_HEIGHT, _TOP, _GAP, _NODE, _STEP = 300.0, 26.0, 4.0, 20.0, 150.0


def flow_chart(flows: Sequence[LayerFlow]) -> str:
    """Return a figure with a column for each MoE layer, its experts as high as their share of the assignments."""
    if not flows:
        return ""
    layers = [flow.layer for flow in flows] + [flows[-1].next_layer]
    width = 60 + _STEP * (len(layers) - 1)
    weak: list[str] = []
    strong: list[str] = []
    for index, flow in enumerate(flows):
        for is_strong, band in _bands(flow, 30 + index * _STEP + _NODE):
            (strong if is_strong else weak).append(band)
    nodes = [node for index, layer in enumerate(layers) for node in _nodes(flows, index, layer)]
    body = "\n".join([*weak, *strong, *nodes])
    label = quoted(f"flow of tokens between the experts of layers {', '.join(map(str, layers))}")
    drawn = (
        f'<div class="wide" tabindex="0"><svg class="plot flow" style="width:{width:g}px" '
        f'viewBox="0 0 {width:g} {_HEIGHT + _TOP + 6:g}" role="img" aria-label="{label}">\n{body}\n</svg></div>'
    )
    return figure("from layer to layer", drawn, note=f"coloured: at least {STRONG:g} times what chance would give")


def strongest_flows(flow: LayerFlow, most: int) -> list[tuple[int, int, float, float]]:
    """Return the flows that are furthest above chance: from, to, share of the sender's, times chance."""
    total = math.fsum(map(math.fsum, flow.counts)) or 1.0
    senders = [math.fsum(row) for row in flow.counts]
    receivers = [math.fsum(column) for column in zip(*flow.counts, strict=True)]
    found = []
    for source, row in enumerate(flow.counts):
        for target, count in enumerate(row):
            if count > 0:
                chance = senders[source] * receivers[target] / total
                found.append((source, target, count / senders[source], count / chance))
    return sorted(found, key=lambda one: (-one[2] * math.log(one[3]), one[0], one[1]))[:most]


def _spans(shares: Sequence[float]) -> list[tuple[float, float]]:
    """Return the top and the height of every expert of a column."""
    total = math.fsum(shares) or 1.0
    room = _HEIGHT - _GAP * (len(shares) - 1)
    spans, y = [], _TOP
    for share in shares:
        spans.append((y, room * share / total))
        y += room * share / total + _GAP
    return spans


def _columns(flow: LayerFlow) -> tuple[list[float], list[float]]:
    return [math.fsum(row) for row in flow.counts], [math.fsum(column) for column in zip(*flow.counts, strict=True)]


def _nodes(flows: Sequence[LayerFlow], index: int, layer: int) -> Iterator[str]:
    """Yield the experts of a layer, whose shares are those of the flow before it, or after it in the first."""
    senders, receivers = _columns(flows[max(0, index - 1)])
    x = 30 + index * _STEP
    yield text(x + _NODE / 2, 14, f"layer {layer}", "quiet mid")
    shares = receivers if index else senders
    for expert, (y, height) in enumerate(_spans(shares)):
        tip = quoted(f"layer {layer}, expert {expert}: {100 * shares[expert] / (math.fsum(shares) or 1):.1f} %")
        box = f'x="{x:g}" y="{y:.1f}" width="{_NODE:g}" height="{max(0.5, height):.1f}"'
        yield f'<rect class="f{expert % 9}" {box}><title>{tip}</title></rect>'
        if height >= 9:
            yield text(x + _NODE / 2, round(y + height / 2 + 4, 1), str(expert), "inside mid")


def _bands(flow: LayerFlow, x: float) -> Iterator[tuple[bool, str]]:
    """Yield whether a flow is above chance, and its band from an expert to one of the next layer."""
    senders, receivers = _columns(flow)
    total = math.fsum(senders) or 1.0
    left, right = _spans(senders), _spans(receivers)
    used = [top for top, _ in right]
    for source, row in enumerate(flow.counts):
        y = left[source][0]
        for target, count in enumerate(row):
            if count <= 0:
                continue
            out = left[source][1] * count / senders[source]
            into = right[target][1] * count / receivers[target]
            lift = count * total / (senders[source] * receivers[target])
            yield lift >= STRONG, _band(flow, (source, target), (x, y, used[target], out, into), lift)
            y += out
            used[target] += into


def _band(flow: LayerFlow, ends: tuple[int, int], place: tuple[float, float, float, float, float], lift: float) -> str:
    source, target = ends
    x, y0, y1, out, into = place
    middle, far = x + (_STEP - _NODE) / 2, x + _STEP - _NODE
    path = (
        f"M{x:g} {y0:.1f}C{middle:g} {y0:.1f} {middle:g} {y1:.1f} {far:g} {y1:.1f}v{into:.1f}"
        f"C{middle:g} {y1 + into:.1f} {middle:g} {y0 + out:.1f} {x:g} {y0 + out:.1f}z"
    )
    style = f"band f{source % 9}" if lift >= STRONG else "band faint"
    share = 100 * flow.counts[source][target] / math.fsum(flow.counts[source])
    way = f"layer {flow.layer} expert {source} to layer {flow.next_layer} expert {target}"
    tip = f"{way}: {share:.1f} %, {lift:.2f} x chance"
    return f'<path class="{style}" d="{path}"><title>{quoted(tip)}</title></path>'
