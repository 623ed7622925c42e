"""Bounding boxes of the texts of an SVG picture, for the widest font a reader may have."""

from typing import NamedTuple
from xml.etree import ElementTree

NAMESPACE = "{http://www.w3.org/2000/svg}"
SIZES = {"title": 15, "value": 10}
"""Font sizes of classes, if not 12 pixels."""
EM, EM_BOLD = 0.6, 0.68
"""Mean width of a character of DejaVu Sans over its size, measured on names and numbers; most fonts are narrower."""


class Text(NamedTuple):
    """Bounding box of a text."""

    words: str
    x: float
    y: float
    width: float
    height: float

    def covers(self, other: "Text") -> bool:
        """Return whether the boxes overlap."""
        is_beside = self.x >= other.x + other.width or other.x >= self.x + self.width
        return not is_beside and self.y < other.y + other.height and other.y < self.y + self.height


def texts(svg: str) -> list[Text]:
    """Return all texts of a picture except tooltips."""
    boxes = []
    for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text"):
        classes = (element.get("class") or "").split()
        size = next((SIZES[name] for name in classes if name in SIZES), 12)
        hidden = "".join(title.text or "" for title in element.iter(f"{NAMESPACE}title"))
        words = "".join(element.itertext()).removesuffix(hidden)
        width = (EM_BOLD if "title" in classes else EM) * size * len(words)
        x = float(element.get("x") or 0)
        if "end" in classes:
            x -= width
        elif {"middle", "value"} & set(classes):
            x -= width / 2
        y = float(element.get("y") or 0)
        boxes.append(Text(words, x, y - 0.75 * size, width, 0.95 * size))
    return boxes


def overlapping(svg: str) -> list[tuple[str, str]]:
    """Return pairs of texts that overlap."""
    boxes = texts(svg)
    return [
        (one.words, other.words) for index, one in enumerate(boxes) for other in boxes[index + 1 :] if one.covers(other)
    ]


def outside(svg: str) -> list[str]:
    """Return texts that are not wholly inside the picture."""
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(key) or 0) for key in ("width", "height"))
    return [
        one.words
        for one in texts(svg)
        if one.x < 0 or one.y < 0 or one.x + one.width > width or one.y + one.height > height
    ]
