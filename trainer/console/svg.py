"""Parts that the SVG pictures share: escaped text with an upper bound of its width, and the file around it."""

import re
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from rich.cells import cell_len

_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_EM: Final = 0.62
"""Mean width of a character, over the font's size: of DejaVu, among the fonts that a reader may have a wide one."""
_EM_BOLD: Final = 0.7
TITLE_SIZE: Final = 15
_LONGEST_TITLE: Final = 90


def text(words: str) -> str:
    """Return text that is nothing but text to a reader of XML."""
    return escape(_NOT_XML.sub("\ufffd", words))


def text_width(words: str, *, size: int = 12, is_bold: bool = False) -> float:
    """Return how many pixels wide text may become, whatever font the reader has."""
    return (_EM_BOLD if is_bold else _EM) * size * cell_len(words)


def cut(words: str, longest: int) -> str:
    """Return text with its middle left out where it is too long: names of one series differ at their ends."""
    if len(words) <= longest:
        return words
    end = (longest - 3) // 2
    return f"{words[: longest - 3 - end]}...{words[-end:]}"


def document(body: Sequence[str], *, title: str, style: str, margin: int, width: float, height: float) -> str:
    """Return the text of an SVG file, at least as wide as its title, which is its first line."""
    shown = cut(title, _LONGEST_TITLE)
    width = max(width, 2 * margin + text_width(shown, size=TITLE_SIZE, is_bold=True))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" role="img">',
            f"<title>{text(title)}</title>",
            f"<style>{style}</style>",
            f'<text class="title" x="{margin}" y="28">{text(shown)}</text>',
            *body,
            "</svg>\n",
        ]
    )
