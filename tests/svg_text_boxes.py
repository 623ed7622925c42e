"""Where the texts of an SVG picture are, by how wide a reader's font may make them."""

from typing import NamedTuple
from xml.etree import ElementTree

NAMESPACE = "{http://www.w3.org/2000/svg}"
SIZES = {"title": 15, "value": 10}
"""Of classes that have another size than 12 pixels."""
EM, EM_BOLD = 0.6, 0.68
"""Mean width of a character of DejaVu Sans over its size, measured on names and numbers; most fonts are narrower."""


class Text(NamedTuple):
    """The box of a text."""

    words: str
    x: float
    y: float
    width: float
    height: float

    def covers(self, other: "Text") -> bool:
        """Whether they have a part in common."""
        beside = self.x >= other.x + other.width or other.x >= self.x + self.width
        return not beside and self.y < other.y + other.height and other.y < self.y + self.height


def texts(svg: str) -> list[Text]:
    """All texts of a picture; what is only said to who points at something is none."""
    found = []
    for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text"):
        classes = (element.get("class") or "").split()
        size = next((SIZES[name] for name in classes if name in SIZES), 12)
        hidden = "".join(title.text or "" for title in element.iter(f"{NAMESPACE}title"))
        words = "".join(element.itertext()).removesuffix(hidden)
        width = (EM_BOLD if "title" in classes else EM) * size * len(words)
        x = float(element.get("x") or 0)
        if {"end", "name"} & set(classes):
            x -= width
        elif {"middle", "value"} & set(classes):
            x -= width / 2
        y = float(element.get("y") or 0)
        found.append(Text(words, x, y - 0.75 * size, width, 0.95 * size))
    return found


def overlapping(svg: str) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other."""
    found = texts(svg)
    return [
        (one.words, other.words) for index, one in enumerate(found) for other in found[index + 1 :] if one.covers(other)
    ]


def outside(svg: str) -> list[str]:
    """Texts that are not in the picture as a whole."""
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(key) or 0) for key in ("width", "height"))
    return [
        one.words
        for one in texts(svg)
        if one.x < 0 or one.y < 0 or one.x + one.width > width or one.y + one.height > height
    ]
