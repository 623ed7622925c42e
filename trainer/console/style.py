"""Colours, drawing characters and line packing that the console's renderables share."""

from collections.abc import Iterator, Sequence
from typing import Final

from rich.text import Text

# Basic colours, so that the terminal's own theme decides how they look on its background.
ACCENT: Final = "cyan"
QUIET: Final = "bright_black"
GOOD: Final = "green"
ALERT: Final = "yellow"

LEVELS: Final = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""A column of a chart, from empty to full in eighths."""
SHADES: Final = "\u00b7\u2591\u2592\u2593\u2588"
"""A heat map's cell: far below the even share, below, even, above, far above."""
AXIS: Final = "\u2502"
AXIS_TICK: Final = "\u2524"


def packed(entries: Sequence[Text], width: int, *, gap: int) -> Iterator[Text]:
    """Join entries into lines of at most `width` columns, breaking between entries only."""
    line = Text()
    for entry in entries:
        if line and line.cell_len + gap + entry.cell_len > width:
            yield line
            line = Text()
        line.append(" " * gap if line else "").append_text(entry)
    if line:
        yield line
