"""Places for the names of points in a picture, where they cover nothing, in pixels."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_HEIGHT = 14
_BESIDE = 9
"""From the middle of a point to its name."""
_NEAR = 40
_CROSSING = 60
"""Cost of a line through another name or point, in pixels away from the point."""


class Box(NamedTuple):
    """A part of the picture."""

    x: float
    y: float
    width: float
    height: float

    def has(self, x: float, y: float) -> bool:
        """Tell whether a point lies in it."""
        return self.x < x < self.x + self.width and self.y < y < self.y + self.height

    def covers(self, other: "Box") -> bool:
        """Tell whether they have a part in common."""
        beside = self.x >= other.x + other.width or other.x >= self.x + self.width
        return not beside and self.y < other.y + other.height and other.y < self.y + self.height


class Line(NamedTuple):
    """From a point to its name."""

    x1: float
    y1: float
    x2: float
    y2: float

    def crosses(self, box: Box) -> bool:
        """Tell whether some of it lies in a box; it is followed two pixels at a time."""
        steps = max(1, math.ceil(math.hypot(self.x2 - self.x1, self.y2 - self.y1) / 2))
        across, down = (self.x2 - self.x1) / steps, (self.y2 - self.y1) / steps
        return any(box.has(self.x1 + across * i, self.y1 + down * i) for i in range(steps))


class Label(NamedTuple):
    """A name beside its point, or away from it with a line that shows whose it is."""

    box: Box
    line: Line | None
    is_left: bool
    """The name stands left of the point and ends there."""


def place_labels(
    points: Mapping[str, tuple[float, float]], widths: Mapping[str, float], taken: Sequence[Box], *, least_x: float
) -> dict[str, Label]:
    """Return where each name covers nothing: near to its point, and with few lines through other names.

    Names are placed one after the other, in several orders; the one that comes out best counts.

    Args:
        points: by name.
        widths: of the names.
        taken: where nothing else may be, the points among it.
        least_x: where the picture begins.
    """
    near = {name: sum(math.dist(at, other) < _NEAR for other in points.values()) for name, at in points.items()}
    keys: list[Callable[[str], tuple[float, ...]]] = [
        lambda name: (-near[name], *points[name]),  # those in a crowd and at the left edge have the fewest places
        lambda name: points[name],
        lambda name: (-points[name][0],),
        lambda name: (points[name][1],),
        lambda name: (-points[name][1],),
    ]
    orders = [sorted(points, key=key) for key in keys]
    return min((_placed(order, points, widths, taken, least_x) for order in orders), key=lambda placed: placed[0])[1]


def _placed(
    order: Sequence[str],
    points: Mapping[str, tuple[float, float]],
    widths: Mapping[str, float],
    taken: Sequence[Box],
    least_x: float,
) -> tuple[float, dict[str, Label]]:
    """Place the names in one order; return what it costs as well."""
    boxes, labels, total = list(taken), dict[str, Label](), 0.0
    for name in order:
        lines = [label.line for label in labels.values() if label.line is not None]
        cost, labels[name] = _place(points[name], widths[name], boxes, lines, least_x)
        boxes.append(labels[name].box)
        total += cost
    return total, labels


def _place(
    point: tuple[float, float], width: float, taken: Sequence[Box], lines: Sequence[Line], least_x: float
) -> tuple[float, Label]:
    """Return the best place for a name beside those that have theirs, and what it costs in pixels from its point."""
    x, y = point
    others = [box for box in taken if not box.has(x, y)]
    best: tuple[float, Label] | None = None
    away = 0
    while best is None or away < best[0]:
        for label in _candidates(x, y, width, away):
            if label.box.x < least_x or any(label.box.covers(other) for other in taken):
                continue
            crossed = sum(line.crosses(label.box) for line in lines)
            crossed += 0 if label.line is None else sum(label.line.crosses(other) for other in others)
            cost = away + _CROSSING * crossed
            if best is None or cost < best[0]:
                best = cost, label
        away += 3
    return best


def _candidates(x: float, y: float, width: float, away: float) -> list[Label]:
    """Return the four places that are so far above or below a point's height."""
    found = []
    for down in (away, -away):
        for is_left in (False, True):
            near = x - _BESIDE if is_left else x + _BESIDE
            box = Box(near - width if is_left else near, y - _HEIGHT / 2 + down, width, _HEIGHT)
            line = Line(x, y, near, y + down) if away > 8 else None
            found.append(Label(box, line, is_left))
    return found
