"""Colours of the report page: two themes, and every pair of them in which one is read upon the other."""

from collections.abc import Iterator, Mapping
from typing import Final, Literal

Theme = Literal["light", "dark"]

_RGB = tuple[int, int, int]
COLOURS: Final[Mapping[Theme, Mapping[str, str]]] = {
    "light": {
        "page": "#ffffff",
        "card": "#f6f8fa",
        "text": "#1f2328",
        "quiet": "#59636e",
        "link": "#0550ae",
        "grid": "#d1d9e0",
        "axis": "#6e7781",
        "chip": "#e3e8ee",
        "alarm": "#a40e26",
        "good": "#116329",
    },
    "dark": {
        "page": "#0d1117",
        "card": "#161b22",
        "text": "#e6edf3",
        "quiet": "#9da7b1",
        "link": "#79b8ff",
        "grid": "#30363d",
        "axis": "#8b949e",
        "chip": "#2a313c",
        "alarm": "#ff9a92",
        "good": "#56d364",
    },
}
# Okabe and Ito's order of hues, darker or lighter until each is read on its background: safe for the colour-blind.
SERIES: Final[Mapping[Theme, tuple[str, ...]]] = {
    "light": ("#0a5ea8", "#a34700", "#00694f", "#8a3578", "#7a5c00", "#0f6c80", "#5b4fc0", "#a11d33", "#4c5560"),
    "dark": ("#6cb6ff", "#f0954b", "#4fd1a5", "#e59ad0", "#e3c341", "#6fd3e8", "#b3a6ff", "#ff9a92", "#b8c0c9"),
}
HALF_STEPS: Final = 6
"""Steps of the scale on each side of its middle."""
# Blue to orange is safe for the colour-blind; the middle is the near background in both themes.
_SCALES: Final[Mapping[Theme, tuple[_RGB, _RGB, _RGB]]] = {
    "light": ((33, 102, 172), (240, 240, 236), (179, 88, 6)),
    "dark": ((108, 182, 255), (38, 44, 54), (240, 149, 75)),
}


def scale_colours(theme: Theme) -> list[tuple[str, str]]:
    """Return the background and the text colour of every step of the scale, lowest first."""
    low, middle, high = _SCALES[theme]
    found = []
    for step in range(-HALF_STEPS, HALF_STEPS + 1):
        end = high if step > 0 else low
        mixed = [round(m + (e - m) * abs(step) / HALF_STEPS) for m, e in zip(middle, end, strict=True)]
        background = "#{:02x}{:02x}{:02x}".format(*mixed)
        found.append((background, max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, background))))
    return found


def read_pairs(theme: Theme) -> Iterator[tuple[str, str, str]]:
    """Yield what is read, its colour and the colour behind it, for all text of a theme."""
    of = COLOURS[theme]
    for behind in ("page", "card"):
        for ink in ("text", "quiet", "link", "alarm", "good"):
            yield f"{ink} on {behind}", of[ink], of[behind]
    for index, colour in enumerate(SERIES[theme]):
        yield f"page on curve {index}", of["page"], colour
    yield "text on chip", of["text"], of["chip"]
    yield "quiet on chip", of["quiet"], of["chip"]
    for step, (background, ink) in enumerate(scale_colours(theme)):
        yield f"step {step} of the scale", ink, background


def seen_pairs(theme: Theme) -> Iterator[tuple[str, str, str]]:
    """Yield what is seen as a shape, its colour and the colour behind it: curves, bars and axes."""
    for behind in ("page", "card"):
        yield f"axis on {behind}", COLOURS[theme]["axis"], COLOURS[theme][behind]
        for index, colour in enumerate(SERIES[theme]):
            yield f"curve {index} on {behind}", colour, COLOURS[theme][behind]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours "#rrggbb", 1 to 21, as WCAG 2.2 defines it."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
