"""Draw curves over steps and parts of a whole as SVG for a page, with their last values in words."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from trainer.console.formatting import rate
from trainer.console.svg import line, text
from trainer.console.ticks import nice_ticks
from trainer.report.markup import PageTable, details, figure, figure_number, foreign, quoted, spelled, table

_WIDTH: Final = 400
_HEIGHT: Final = 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34
MOST_POINTS: Final = 240
"""Points of a curve; of more, the lowest and the highest of each stretch are drawn."""
_MOST_ROWS: Final = 60  # rows of the folded table
_DASHES: Final = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A series over steps; values that are None or not finite leave a gap."""

    name: str
    """Empty: it is the only one of its chart, whose title says it all."""
    steps: Sequence[int]
    values: Sequence[float | None]
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True, slots=True)
class _Axes:
    """From steps and values to pixels."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - self.low) / ((self.high - self.low) or 1)


def curve_chart(
    title: str, curves: Sequence[Curve], *, unit: str = "", floor: float | None = None, axis: str = "step"
) -> str:
    """Return a figure of curves over steps, or nothing if none has a finite value.

    The vertical axis includes `floor`, if there is one. The values, thinned out, are in a folded table.
    """
    kept = [thinned for curve in curves if (thinned := _thinned(curve)).steps]
    if not kept:
        return ""
    axes = _axes(kept, floor)
    body = _grid(axes, axis)
    body += [_path(curve, axes) for curve in kept]
    ends = "; ".join(f"{spelled(c.name)} ends at {figure_number(c.values[-1])}".strip() for c in kept)
    drawn = _svg(body, f"{title} over {axis} {int(axes.first)} to {int(axes.last)}: {ends}", height=_HEIGHT, axis=axis)
    keys = "".join(_key(curve) for curve in kept)
    folded = details("numbers", table(_numbers(kept, axis, unit)))
    return figure(title, f'{drawn}<ul class="keys">{keys}</ul>{folded}', note=unit)


def share_bars(title: str, parts: Sequence[str], bars: Sequence[tuple[str, Sequence[float]]], *, unit: str) -> str:
    """Return a figure of a bar for each name, divided into parts, whose lengths are comparable between bars."""
    longest = max((math.fsum(values) for _, values in bars), default=0.0)
    if longest <= 0:
        return ""
    body, y = [], 4.0
    for name, values in bars:
        total = math.fsum(values)
        label = f"{spelled(name)}: {figure_number(total)} {unit}" if name else f"{figure_number(total)} {unit}"
        body.append(text(0, y + 12, label, "quiet"))
        x = 0.0
        for index, (part, value) in enumerate(zip(parts, values, strict=True)):
            width = _WIDTH * value / longest
            tip = quoted(f"{part}: {figure_number(value)} {unit}, {100 * value / total:.1f} %")
            box = f'x="{x:.1f}" y="{y + 18:.1f}" width="{max(0.0, width - 1):.1f}" height="20"'
            body.append(f'<rect class="f{index % 9}" {box}><title>{tip}</title></rect>')
            x += width
        y += 48
    sums = [math.fsum(values[i] for _, values in bars) for i in range(len(parts))]
    keys = "".join(
        f'<li><span class="swatch b{i % 9}"></span>{foreign(part)}</li>' for i, part in enumerate(parts) if sums[i]
    )
    rows = [[part, *_cells([values for _, values in bars], i)] for i, part in enumerate(parts)]
    heads = [head for name, _ in bars for head in (f"{name} {unit}".strip(), "%")]
    numbers = table(PageTable(heads=["part", *heads], rows=rows))
    drawn = f'<div class="bars">{_svg(body, title, height=y)}</div>'
    return figure(title, f'{drawn}<ul class="keys">{keys}</ul>{numbers}')


def _cells(bars: Sequence[Sequence[float]], part: int) -> Iterator[float]:
    """Yield the value of a part in every bar, and its percent of the bar."""
    for values in bars:
        yield values[part]
        yield round(100 * values[part] / (math.fsum(values) or 1), 1)


def _axes(curves: Sequence[Curve], floor: float | None) -> _Axes:
    values = [value for curve in curves for value in curve.values if value is not None]
    low, high = min(values), max(values)
    if floor is not None:
        low, high = min(low, floor), max(high, floor)
    if high == low:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    margin = 0.03 * (high - low)
    low = low if low == floor else low - margin
    return _Axes(min(c.steps[0] for c in curves), max(c.steps[-1] for c in curves), low, high + margin)


def _grid(axes: _Axes, axis: str) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    body = [line(_LEFT, bottom, _WIDTH - _RIGHT, bottom, "axis")]
    for value in nice_ticks(axes.low, axes.high):
        y = round(axes.y(value), 1)
        body += [line(_LEFT, y, _WIDTH - _RIGHT, y, "rule"), text(_LEFT - 6, y + 4, _short(value), "quiet end")]
    ticks = nice_ticks(axes.first, axes.last, 6)
    body += [text(round(axes.x(step), 1), bottom + 16, _short(step), "quiet mid") for step in ticks]
    return [*body, text(_WIDTH - _RIGHT, _HEIGHT - 4, axis, "quiet end")]


def _path(curve: Curve, axes: _Axes) -> str:
    """Return a curve with its numbers for the script, and a point where a value stands alone."""
    moves, is_open = list[str](), False
    for step, value in zip(curve.steps, curve.values, strict=True):
        if value is not None:
            moves.append(f"{'L' if is_open else 'M'}{axes.x(step):.1f} {axes.y(value):.1f}")
        is_open = value is not None
    alone = " dot" if len(moves) == 1 else ""
    ends = zip(moves, [*moves[1:], "M"], strict=True)
    drawn = "".join(f"{move}h0.1" if move[0] == following[0] == "M" else move for move, following in ends)
    values = " ".join("-" if value is None else f"{value:.5g}" for value in curve.values)
    return (
        f'<path class="s{curve.colour % 9}{alone}" d="{drawn}"{_dash(curve)} data-name="{quoted(curve.name)}" '
        f'data-steps="{" ".join(map(str, curve.steps))}" data-values="{values}"/>'
    )


def _short(value: float) -> str:
    return rate(value) if abs(value) >= 10_000 else f"{value:.4g}"


def _dash(curve: Curve) -> str:
    pattern = _DASHES[curve.dash % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _key(curve: Curve) -> str:
    stroke = f'<path class="s{curve.colour % 9}"{_dash(curve)} d="M0 4h24"/>'
    mark = f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true">{stroke}</svg>'
    return f"<li>{mark}{foreign(curve.name or 'last')}: <b>{figure_number(curve.values[-1])}</b></li>"


def _numbers(curves: Sequence[Curve], axis: str, unit: str) -> PageTable:
    """Return the values of curves by step: the last of every curve, and evenly chosen ones before it."""
    by_step = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    steps = sorted({step for values in by_step for step in values})
    every = math.ceil(len(steps) / _MOST_ROWS)
    shown = sorted({*steps[::-1][::every], *(curve.steps[-1] for curve in curves)})
    rows = [[step, *(values.get(step) for values in by_step)] for step in shown]
    return PageTable(heads=[axis, *(curve.name or "value" for curve in curves)], rows=rows, caption=unit)


def _thinned(curve: Curve) -> Curve:
    """Return a curve without what is not finite at its ends, and with at most MOST_POINTS points and its last."""
    pairs = [
        (s, v if v is not None and math.isfinite(v) else None) for s, v in zip(curve.steps, curve.values, strict=True)
    ]
    while pairs and pairs[-1][1] is None:
        pairs.pop()
    if len(pairs) > MOST_POINTS:
        last, size = pairs[-1], math.ceil(2 * len(pairs) / (MOST_POINTS - 2))
        kept = []
        for start in range(0, len(pairs), size):
            stretch = [pair for pair in pairs[start : start + size] if pair[1] is not None]
            ends = (
                {min(stretch, key=lambda p: p[1] or 0.0), max(stretch, key=lambda p: p[1] or 0.0)} if stretch else set()
            )
            kept += sorted(ends, key=lambda pair: pair[0])
        pairs = kept if kept[-1] == last else [*kept, last]
    return Curve(
        name=curve.name,
        steps=[step for step, _ in pairs],
        values=[value for _, value in pairs],
        colour=curve.colour,
        dash=curve.dash,
    )


def _svg(body: Sequence[str], label: str, *, height: float, axis: str = "") -> str:
    inner, box = "\n".join(body), f'viewBox="0 0 {_WIDTH} {height:g}"'
    named = f' data-axis="{quoted(axis)}"' if axis else ""
    return f'<svg class="plot" {box}{named} role="img" aria-label="{quoted(label)}">\n{inner}\n</svg>'
