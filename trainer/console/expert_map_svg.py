"""Draw which experts serve which domains as an SVG picture.

# L layers, G domains, E experts.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from trainer.console.svg import MARGIN, ROW, document, escaped, rect, shortened, text, text_width
from trainer.metrics.specialisation import domain_entropy_bits, mutual_information_bits

_GAP = 30
_MAX_NAME = 40
_MAX_MAP_WIDTH, _MIN_WIDTH = 640, 500
_NOTE = "expert and domain share {:.2f} of {:.2f} bits"
_SCALE = (0.25, 0.5, 1.0, 2.0, 4.0)  # labelled values of the colour scale, in units of the even share 1 / E
# Blue to orange is safe for the colour-blind, and both ends are darker than the middle.
_LOW, _EVEN, _HIGH = (33, 102, 172), (240, 240, 236), (179, 88, 6)


def expert_map_svg(
    counts: Sequence[Sequence[Sequence[float]]], domains: Sequence[str], layer_names: Sequence[str], *, title: str
) -> str:
    """Draw a heat map of each MoE layer: a row for each domain, a column for each expert, its share as colour.

    The heading of a map has the mutual information of expert and domain. Cells have their numbers as tooltips.
    The assignments are (L, G, E).
    """
    array = np.asarray(counts, dtype=float)
    num_experts = array.shape[2]
    left = math.ceil(MARGIN + max(text_width(shortened(domain, _MAX_NAME)) for domain in domains) + 10)
    cell = max(6, min(34, _MAX_MAP_WIDTH // num_experts))
    headings = [text_width(f"{name}  {_NOTE}", is_bold=True) for name in layer_names]
    width = max(left + cell * num_experts, MARGIN + max(_MIN_WIDTH, *headings)) + MARGIN
    map_height, top = 2 * ROW + ROW * len(domains) + _GAP, 116
    body = [*_head(num_experts)]
    for layer, name in enumerate(layer_names):
        body += _map(array[layer], domains, name, left=left, top=top + layer * map_height, cell=cell)
    return document(body, title=title, width=width, height=top + len(layer_names) * map_height)


def _head(num_experts: int) -> Iterator[str]:
    note = f"a row is a domain, a column an expert; shares in percent, even is 1/{num_experts}"
    yield text(MARGIN, 48, note, "quiet")
    labels = [f"<={_SCALE[0]:g}x", *(f"{value:g}x" for value in _SCALE[1:-1]), f">={_SCALE[-1]:g}x"]
    size = math.ceil(max(map(text_width, labels))) + 8
    for index, (value, label) in enumerate(zip(_SCALE, labels, strict=True)):
        x = MARGIN + index * size
        yield rect(x, 60, size, 14, "scale", fill=_colour(value))
        yield text(x + size / 2, 88, label, "quiet middle")


def _map(counts: np.ndarray, domains: Sequence[str], name: str, *, left: int, top: int, cell: int) -> Iterator[str]:
    num_experts = counts.shape[1]
    note = _NOTE.format(mutual_information_bits(counts.tolist()), domain_entropy_bits(counts.tolist()))
    yield f'<text x="{MARGIN}" y="{top}"><tspan class="bold">{escaped(name)}</tspan>'
    yield f'<tspan class="quiet" dx="10">{note}</tspan></text>'
    # Expert numbers are thinned out so that they do not run into each other.
    every = max(1, math.ceil((text_width(str(num_experts), size=10) + 2) / cell))
    for expert in range(0, num_experts, every):
        yield text(left + expert * cell + cell / 2, top + ROW - 4, str(expert), "value quiet")
    for row, (domain, of_domain) in enumerate(zip(domains, counts, strict=True)):
        y = top + (row + 1) * ROW
        yield text(left - 8, y + 15, shortened(domain, _MAX_NAME), "end", tooltip=domain)
        total = of_domain.sum()
        if total == 0:
            yield rect(left, y, cell * num_experts, ROW - 1, "none")
            continue
        for expert, share in enumerate(of_domain / total):
            x, ratio = left + expert * cell, share * num_experts
            tooltip = f"{domain}, expert {expert}: {100 * share:.1f} % of assignments, {ratio:.2f} times the even share"
            yield rect(x, y, cell - 1, ROW - 1, "cell", fill=_colour(ratio), tooltip=tooltip)
            if cell >= 26:  # wide enough for a number
                style = "value on-light" if abs(scale_position(ratio)) < 0.6 else "value on-dark"
                yield text(x + cell / 2, y + 15, f"{100 * share:.0f}", style)


def scale_position(ratio: float) -> float:
    """Return the position of a share on the scale: -1 at a quarter of the even share or less, 1 at four times it."""
    return -1.0 if ratio <= 0 else max(-1.0, min(1.0, math.log2(ratio) / 2))


def _colour(ratio: float) -> str:
    position = scale_position(ratio)
    end = _HIGH if position > 0 else _LOW
    mixed = [round(even + (far - even) * abs(position)) for even, far in zip(_EVEN, end, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)
