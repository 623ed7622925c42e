"""Write self-contained SVG pictures: escaped text, shared style for light and dark themes, and the enclosing file."""

import re
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from rich.cells import cell_len

MARGIN: Final = 16
ROW: Final = 22
"""Height of a row, in pixels."""
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_EM: Final = 0.62  # mean character width over font size, for DejaVu: a wide font among those a reader may have
_EM_BOLD: Final = 0.7
_TITLE_SIZE: Final = 15
_MAX_TITLE: Final = 90
_STYLE: Final = """
svg { background: #ffffff; font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 } .bold { font-weight: 600 } .quiet { fill: #59636e }
.end { text-anchor: end } .middle, .value { text-anchor: middle } .value { font-size: 10px }
.on-dark { fill: #ffffff } .on-light { fill: #1f2328 }
.bar { fill: #2166ac } .more { fill: #a8c6e5 } .axis { stroke: #8c959f } .grid { stroke: #d1d9e0 }
.none { fill: none; stroke: #8c959f; stroke-dasharray: 3 }
.no { fill: #2166ac; stroke: #2166ac } .ahead { fill: #ffffff; stroke: #b35806; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117; fill: #e6edf3 } .quiet { fill: #9198a1 } .bar { fill: #6cb6ff } .more { fill: #2c4f73 }
  .axis { stroke: #656c76 } .grid { stroke: #2a313c } .no { fill: #6cb6ff; stroke: #6cb6ff }
  .ahead { fill: #0d1117; stroke: #f0883e }
}
"""


def escaped(words: str) -> str:
    """Return text escaped for XML; characters that XML cannot hold are replaced."""
    return escape(_NOT_XML.sub("\ufffd", words))


def text_width(words: str, *, size: int = 12, is_bold: bool = False) -> float:
    """Return an upper bound of the width of text in pixels, whatever font the reader has."""
    return (_EM_BOLD if is_bold else _EM) * size * cell_len(words)


def shortened(words: str, max_length: int) -> str:
    """Leave out the middle of text that is too long: names of one series differ at their ends."""
    if len(words) <= max_length:
        return words
    end = (max_length - 3) // 2
    return f"{words[: max_length - 3 - end]}...{words[-end:]}"


def text(x: float, y: float, words: str, style: str = "", *, tooltip: str = "") -> str:
    """Return a text element with its baseline at `y`."""
    css = f' class="{style}"' if style else ""
    return f'<text{css} x="{x:g}" y="{y:g}">{escaped(words)}{_title(tooltip)}</text>'


def rect(x: float, y: float, width: float, height: float, style: str, *, fill: str = "", tooltip: str = "") -> str:
    """Return a rectangle."""
    colour = f' fill="{fill}"' if fill else ""
    box = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect class="{style}" {box}{colour}>{_title(tooltip)}</rect>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """Return a line."""
    return f'<line class="{style}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def circle(x: float, y: float, style: str, *, tooltip: str = "") -> str:
    """Return a point of a scatter plot."""
    return f'<circle class="{style}" cx="{x:g}" cy="{y:g}" r="5">{_title(tooltip)}</circle>'


def document(body: Sequence[str], *, title: str, width: float, height: float) -> str:
    """Return the text of an SVG file with its title as the first line; it is at least as wide as the title."""
    shown = shortened(title, _MAX_TITLE)
    width = max(width, 2 * MARGIN + text_width(shown, size=_TITLE_SIZE, is_bold=True))
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{_title(title)}\n<style>{_STYLE}</style>'
    return "\n".join([head, text(MARGIN, 28, shown, "title"), *body, "</svg>\n"])


def _title(words: str) -> str:
    return f"<title>{escaped(words)}</title>" if words else ""
