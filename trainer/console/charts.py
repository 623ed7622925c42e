"""Loss curves for the terminal, as pure functions of plain numbers."""

import math
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from trainer.console.style import ACCENT, AXIS, AXIS_TICK, LEVELS, QUIET


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw a curve one line high, from the lowest value to the highest, in at most `width` characters.

    Values are averaged if there are more than characters, and not stretched if there are fewer. None and non-finite
    values are spaces.
    """
    if not values or width < 1:
        return ""
    numbers = _floats(values)
    num_columns = min(width, len(numbers))
    columns = _mean_by_column(numbers, np.arange(len(numbers)) * num_columns // len(numbers), num_columns)
    finite = columns[np.isfinite(columns)]
    if finite.size == 0:
        return " " * num_columns
    low, high = float(finite.min()), float(finite.max())
    blocks = LEVELS[1:]  # the lowest value is visible too
    per_unit = (len(blocks) - 1) / ((high - low) or 1)
    return "".join(" " if math.isnan(v) else blocks[round((v - low) * per_unit)] for v in columns)


def loss_chart(steps: Sequence[int], values: Sequence[float | None], width: int, height: int) -> Text:
    """Draw a curve with labelled axes in exactly `height` >= 3 lines of at most `width` characters, labels included.

    Each column is the mean of the values logged in its range of steps. A range without records is interpolated; one
    without finite values (None, NaN) is left empty. The lowest row starts just below the lowest value, not at 0. A
    damaged log may have its steps out of order.
    """
    numbers = _floats(values)
    finite = numbers[np.isfinite(numbers)]
    if finite.size == 0:
        return Text("no finite value was logged", style=QUIET)
    num_rows = max(2, height - 1)
    # Labels are means, which lie between these two and are no longer to write.
    label_width = max(len(_label(v)) for v in (finite.min(), finite.max()))
    at = np.asarray(steps, dtype=float)
    columns = _resample(at, numbers, max(8, width - label_width - 2))
    drawn = columns[np.isfinite(columns)]
    low, high = float(drawn.min()), float(drawn.max())
    # One eighth of a row below the minimum, so that the lowest value still shows.
    floor = low - ((high - low) or 1) / (num_rows * 8)
    rows_per_unit = num_rows / ((high - floor) or 1)
    labels = {0: _label(high), num_rows - 1: _label(low)}
    if num_rows > 2:
        labels[num_rows // 2] = _label(high / 2 + low / 2)
    chart = Text(no_wrap=True)
    for row in range(num_rows):
        axis = AXIS_TICK if row in labels else AXIS
        chart.append(f"{labels.get(row, ''):>{label_width}} {axis}", style=QUIET)
        chart.append(_chart_row(columns, num_rows - 1 - row, rows_per_unit, floor) + "\n", style=ACCENT)
    chart.append(" " * (label_width + 2) + _step_labels(int(at.min()), int(at.max()), len(columns)), style=QUIET)
    return chart


def _label(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.1e}"


def _chart_row(columns: np.ndarray, row: int, rows_per_unit: float, floor: float) -> str:
    """Draw row `row`, counted from the bottom: each column is full, empty, or ends here."""
    top = len(LEVELS) - 1
    cells = []
    for value in columns:
        filled = 0.0 if math.isnan(value) else (value - floor) * rows_per_unit - row
        cells.append(LEVELS[min(top, max(0, round(filled * top)))])
    return "".join(cells).rstrip()


def _step_labels(first: int, last: int, width: int) -> str:
    left, right = f"{first:,}", f"{last:,} steps"
    return left + right.rjust(width - len(left)) if len(left) + len(right) < width else right


def _resample(steps: np.ndarray, values: np.ndarray, num_columns: int) -> np.ndarray:
    """Average values by column; interpolate columns in which no step was logged."""
    span = np.ptp(steps) or 1.0
    where = np.minimum(((steps - steps.min()) / span * num_columns).astype(int), num_columns - 1)
    columns = _mean_by_column(values, where, num_columns)
    is_finite = np.isfinite(columns)
    unlogged = np.bincount(where, minlength=num_columns) == 0
    at = np.arange(num_columns)
    columns[unlogged] = np.interp(at[unlogged], at[is_finite], columns[is_finite])
    return columns


def _mean_by_column(values: np.ndarray, column: np.ndarray, num_columns: int) -> np.ndarray:
    finite = np.isfinite(values)
    count = np.bincount(column[finite], minlength=num_columns)
    total = np.bincount(column[finite], weights=values[finite], minlength=num_columns)
    return np.divide(total, count, out=np.full(num_columns, np.nan), where=count > 0)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], dtype=float)
