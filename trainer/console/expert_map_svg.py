"""Draw which experts serve which domains as a self-contained SVG, for light and dark themes.

# L layers, G domains, E experts.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.console.svg import cut, document, text, text_width
from trainer.metrics.specialisation import domain_entropy_bits, mutual_information_bits

_MARGIN, _ROW, _GAP = 16, 22, 30
_SMALL = 10
"""Size of the numbers."""
_LONGEST_NAME = 40
_WIDEST_MAP, _LEAST_WIDTH = 640, 500
_NOTE = "the expert tells {:.2f} of {:.2f} bits of a token's domain"
_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Steps of the scale, in units of the even share 1 / E."""
# Blue to orange is told apart by the colour-blind, and both are darker than the middle.
_LOW, _EVEN, _HIGH = (33, 102, 172), (240, 240, 236), (179, 88, 6)
_STYLE = """
svg { background: #ffffff; font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 } .layer { font-weight: 600 } .quiet { fill: #59636e }
.name { text-anchor: end } .middle { text-anchor: middle } .value { text-anchor: middle; font-size: 10px }
.on-dark { fill: #ffffff }
.on-light { fill: #1f2328 } .none { fill: none; stroke: #8c959f; stroke-dasharray: 3 }
@media (prefers-color-scheme: dark) { svg { background: #0d1117; fill: #e6edf3 } .quiet { fill: #9198a1 } }
"""


def experts_svg(
    counts: Sequence[Sequence[Sequence[float]]], domains: Sequence[str], layer_names: Sequence[str], *, title: str
) -> str:
    """Draw a heat map of each MoE layer: a row for each domain, a column for each expert, its share as colour.

    Over each map stands the mutual information of expert and domain. Every cell says its numbers to who points at it.

    Args:
        counts: (L, G, E) assignments.
        domains: G names.
        layer_names: L names.
        title: the first line.

    Returns:
        The text of an SVG file.

    Raises:
        ValueError: if the shapes disagree.
    """
    table = np.asarray(counts, dtype=float)
    if table.ndim != 3 or table.shape[:2] != (len(layer_names), len(domains)) or 0 in table.shape:
        raise ValueError(
            f"counts: shape {table.shape}; (layers, domains, experts) is needed, with {len(layer_names)} layers and "
            f"{len(domains)} domains"
        )
    num_experts = table.shape[2]
    shown = [cut(domain, _LONGEST_NAME) for domain in domains]
    left = math.ceil(_MARGIN + max(map(text_width, shown)) + 10)
    cell = max(6, min(34, _WIDEST_MAP // num_experts))
    headings = [text_width(f"{name}  {_NOTE}", is_bold=True) for name in layer_names]
    width = max(left + cell * num_experts, _MARGIN + max(_LEAST_WIDTH, *headings)) + _MARGIN
    map_height = 2 * _ROW + _ROW * len(domains) + _GAP
    top = 116
    body = [*_head(num_experts)]
    for layer, name in enumerate(layer_names):
        body += _map(table[layer], domains, shown, name, left=left, top=top + layer * map_height, cell=cell)
    height = top + len(layer_names) * map_height
    return document(body, title=title, style=_STYLE, margin=_MARGIN, width=width, height=height)


def _head(num_experts: int) -> Iterator[str]:
    words = f"a row is a domain, a column an expert; shares in percent, even is 1/{num_experts}"
    yield f'<text class="quiet" x="{_MARGIN}" y="48">{words}</text>'
    labels = [{_STEPS[0]: f"<={step:g}x", _STEPS[-1]: f">={step:g}x"}.get(step, f"{step:g}x") for step in _STEPS]
    size = math.ceil(max(map(text_width, labels))) + 8
    for index, (step, label) in enumerate(zip(_STEPS, labels, strict=True)):
        x = _MARGIN + index * size
        yield f'<rect class="scale" x="{x}" y="60" width="{size}" height="14" fill="{_colour(step)}"/>'
        yield f'<text class="quiet middle" x="{x + size / 2:g}" y="88">{text(label)}</text>'


def _map(
    counts: NDArray[np.float64],
    domains: Sequence[str],
    shown: Sequence[str],
    name: str,
    *,
    left: int,
    top: int,
    cell: int,
) -> Iterator[str]:
    num_experts = counts.shape[1]
    bits, most = mutual_information_bits(counts.tolist()), domain_entropy_bits(counts.tolist())
    note = _NOTE.format(bits, most)
    yield f'<g><text x="{_MARGIN}" y="{top}"><tspan class="layer">{text(name)}</tspan>'
    yield f'<tspan class="quiet" dx="10">{note}</tspan></text>'
    # Numbers that do not run into each other.
    every = max(1, math.ceil((text_width(str(num_experts), size=_SMALL) + 2) / cell))
    for expert in range(0, num_experts, every):
        x = left + expert * cell + cell / 2
        yield f'<text class="value quiet" x="{x:g}" y="{top + _ROW - 4}">{expert}</text>'
    for row, (domain, label, own) in enumerate(zip(domains, shown, counts, strict=True)):
        y = top + (row + 1) * _ROW
        yield f'<text class="name" x="{left - 8}" y="{y + 15}">{text(label)}<title>{text(domain)}</title></text>'
        total = own.sum()
        if total == 0:
            yield f'<rect class="none" x="{left}" y="{y}" width="{cell * num_experts}" height="{_ROW - 1}"/>'
            continue
        for expert, count in enumerate(own):
            yield _cell(domain, expert, count / total, num_experts, x=left + expert * cell, y=y, cell=cell)
    yield "</g>"


def _cell(domain: str, expert: int, share: float, num_experts: int, *, x: int, y: int, cell: int) -> str:
    ratio = share * num_experts
    label = text(f"{domain}, expert {expert}: {100 * share:.1f} % of assignments, {ratio:.2f} times the even share")
    rect = (
        f'<rect class="cell" x="{x}" y="{y}" width="{cell - 1}" height="{_ROW - 1}" '
        f'fill="{_colour(ratio)}"><title>{label}</title></rect>'
    )
    if cell < 26:  # no room for a number
        return rect
    kind = "on-light" if abs(_place(ratio)) < 0.6 else "on-dark"
    return f'{rect}<text class="value {kind}" x="{x + cell / 2:g}" y="{y + 15}">{100 * share:.0f}</text>'


def _place(ratio: float) -> float:
    """Return where on the scale a share is: -1 a quarter of the even share or less, 0 even, 1 four times or more."""
    return -1.0 if ratio <= 0 else max(-1.0, min(1.0, math.log2(ratio) / 2))


def _colour(ratio: float) -> str:
    place = _place(ratio)
    end = _HIGH if place > 0 else _LOW
    mixed = [round(even + (far - even) * abs(place)) for even, far in zip(_EVEN, end, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)
