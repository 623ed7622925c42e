"""Draw a matrix as a heat map for a page: a table whose cells are coloured by the steps of one scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from trainer.console.expert_map_svg import scale_position
from trainer.report.markup import figure, quoted
from trainer.report.page_colours import HALF_STEPS

HeatScale = Literal["even_share", "share", "signed"]
"""Middle of the scale: the even share of a row, zero at its lower end, or zero between -1 and 1."""
MOST_CELLS: Final = 4096
"""Cells of a map: larger ones are left to the JSON."""
EVEN_SHARE: Final = "blue is a quarter of the even share or less, orange four times it or more"
SIGNED: Final = "hundredths; blue is -100, orange 100"
"""Meaning of the colours of a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """A matrix with names: values are shares or cosines, shown in hundredths; None is an empty cell."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    scale: HeatScale
    corner: str = ""
    """Title of the columns."""
    note: str = ""
    even: float | None = None
    """The even share; None: the mean of each row."""


def heat_chart(heat: HeatMap) -> str:
    """Return a figure of a matrix, or nothing if it is empty."""
    num_columns = len(heat.columns)
    if not heat.rows or not num_columns:
        return ""
    if len(heat.rows) * num_columns > MOST_CELLS:
        size = f"{len(heat.rows)} x {num_columns} cells are too many for a page; the JSON has them."
        return figure(heat.title, f'<p class="note">{size}</p>')
    heads = "".join(f'<th scope="col">{quoted(name)}</th>' for name in heat.columns)
    rows = []
    for name, values in zip(heat.rows, heat.values, strict=True):
        given = [value for value in values if value is not None]
        even = heat.even if heat.even is not None else math.fsum(given) / max(1, len(given))
        cells = "".join(_cell(value, even, heat.scale) for value in values)
        rows.append(f'<tr><th scope="row">{quoted(name)}</th>{cells}</tr>\n')
    body = (
        f'<div class="wide" tabindex="0"><table class="heat" aria-label="{quoted(heat.title)}"><thead><tr>'
        f"<td>{quoted(heat.corner)}</td>{heads}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return figure(heat.title, body, note=heat.note)


def scale_step(value: float, even: float, scale: HeatScale) -> int:
    """Return the step of a value on the scale, 0 to 2 * HALF_STEPS."""
    if scale == "even_share":
        position = scale_position(value / even) if even > 0 else 0.0
    else:
        position = min(1.0, max(0.0 if scale == "share" else -1.0, value))
    return HALF_STEPS + round(position * HALF_STEPS)


def _cell(value: float | None, even: float, scale: HeatScale) -> str:
    if value is None or not math.isfinite(value):
        return "<td>-</td>"
    return f'<td class="c{scale_step(value, even, scale)}" title="{100 * value:.2f}">{round(100 * value)}</td>'
