"""Lay out parts of a screen side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text


def packed(entries: Sequence[Text], width: int, *, gap: int) -> Iterator[Text]:
    """Join entries to lines of at most `width` columns without ever breaking one that fits on a line."""
    line = Text()
    for entry in entries:
        if line and line.cell_len + gap + entry.cell_len > width:
            yield line
            line = Text()
        line.append(" " * gap if line else "").append_text(entry)
    if line:
        yield line


@dataclass(frozen=True, slots=True)
class Within:
    """A renderable kept to fewer columns than the screen has."""

    renderable: RenderableType
    width: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as on a screen of `width` columns."""
        yield from console.render(self.renderable, options.update_width(self.width))
