"""The few colours and drawing characters of the console, and ASCII ones for terminals that cannot show them."""

from dataclasses import dataclass

# Names from the sixteen basic colours: the person's own theme decides how they look on its background.
ACCENT = "cyan"
QUIET = "bright_black"
GOOD = "green"
ALERT = "yellow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """One alphabet for every picture, so that a screen is either all blocks or all ASCII."""

    levels: str
    """A column filling up from empty to full, at least two characters."""
    shades: str
    """Five cells: far below even, below, even, above, far above."""
    bar_done: str
    bar_left: str
    tick: str
    """Vertical axis where a label stands."""
    axis: str
    """Vertical axis elsewhere."""


UNICODE = Glyphs(
    levels=" \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588",
    shades="\u00b7\u2591\u2592\u2593\u2588",
    bar_done="\u2501",
    bar_left="\u2500",
    tick="\u2524",
    axis="\u2502",
)
ASCII = Glyphs(levels=" .:-=+*#", shades=".:-+#", bar_done="=", bar_left="-", tick="+", axis="|")


def glyphs_for(encoding: str) -> Glyphs:
    """Return the blocks where the output is UTF, ASCII elsewhere: other encodings may lack any of them."""
    return UNICODE if encoding.lower().startswith("utf") else ASCII
