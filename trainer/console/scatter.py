"""Scatter plots as parts of an SVG picture: points joined to their names on the right, with bars of an error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.console.svg import circle, line, text, text_width
from trainer.console.ticks import nice_ticks

LINE_HEIGHT = 14
"""Least distance between two names, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of a scatter plot."""

    x: float
    y: float
    name: str
    style: str = "no"
    tooltip: str = ""
    error: float = 0.0
    """Half the height of its bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """A scatter plot in a picture, with its corner at the left and top of the axes."""

    points: Sequence[Point]
    left: float
    top: float
    width: float = 560
    height: float = 380
    x_title: str = ""

    @property
    def bottom(self) -> float:
        """Where the axis at the bottom is; names of many points need a taller plot."""
        return self.top + max(self.height, len(self.points) * LINE_HEIGHT)

    @property
    def right(self) -> float:
        """Where the names end."""
        names = max((text_width(point.name) for point in self.points), default=0)
        return self.left + self.width + 14 + names

    def draw(self, x_label: Callable[[float], str], y_label: Callable[[float], str]) -> list[str]:
        """Return the elements of the plot; the labels of the axes are numbers as these functions write them."""
        low_x, high_x = _axis([point.x for point in self.points])
        ends = [point.y + sign * point.error for point in self.points for sign in (-1, 1)]
        low_y, high_y = _axis(ends)
        left, top, bottom, end = self.left, self.top, self.bottom, self.left + self.width
        body = [text(end, bottom + 42, self.x_title, "quiet end")] if self.x_title else []
        body += [line(left, top, left, bottom, "axis"), line(left, bottom, end, bottom, "axis")]
        scale_x, scale = self.width / (high_x - low_x), (bottom - top) / (high_y - low_y)
        for value in nice_ticks(low_x, high_x, 6):
            x = left + (value - low_x) * scale_x
            body += [line(x, top, x, bottom, "grid"), text(x, bottom + 18, x_label(value), "quiet middle")]
        for value in nice_ticks(low_y, high_y, 8):
            y = top + (high_y - value) * scale
            body += [line(left, y, end, y, "grid"), text(left - 8, y + 4, y_label(value), "quiet end")]
        circles, label_y = [], top - LINE_HEIGHT / 2
        for number, point in enumerate(sorted(self.points, key=lambda point: -point.y)):
            x, y = left + (point.x - low_x) * scale_x, top + (high_y - point.y) * scale
            if point.error:
                body.append(line(x, y - point.error * scale, x, y + point.error * scale, "axis"))
            circles.append(circle(x, y, point.style, tooltip=point.tooltip))
            # As near to the height of its point as the names above and those still to come below it allow.
            lowest = bottom - (len(self.points) - 1 - number) * LINE_HEIGHT
            label_y = min(max(y, label_y + LINE_HEIGHT), lowest)
            body += [line(x, y, end + 10, label_y, "axis"), text(end + 14, label_y + 4, point.name)]
        return [*body, *circles]


def _axis(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.08 * (high - low) or 0.05 * max(abs(high), 1.0)
    return low - margin, high + margin
