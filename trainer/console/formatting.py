"""Format numbers for people: None is a dash, non-finite numbers are named."""

import math
from itertools import pairwise

DASH = "-"

_SUFFIXES = ("", "k", "M", "G", "T", "P", "E")
_SECONDS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def number(value: float | None, *, digits: int = 3) -> str:
    """Format with a fixed number of digits after the point."""
    if value is not None and abs(value) >= 1e15:  # a damaged log, or a run that diverged
        return f"{value:.{digits}e}"
    return DASH if value is None else f"{value:.{digits}f}"


def rate(value: float | None) -> str:
    """Format a count or a speed to three figures: 812, 45.2k, 1.25M."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return f"{value}"
    power = 0
    while abs(value) >= 999.5 and power < len(_SUFFIXES) - 1:
        value /= 1000
        power += 1
    digits = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{_SUFFIXES[power]}"


def percent(fraction: float | None) -> str:
    """Format a fraction of 1 as a percentage."""
    return DASH if fraction is None else f"{100 * fraction:.1f}%"


def ratio(value: float | None) -> str:
    """Format a multiple of the mean: 1.23x."""
    return DASH if value is None else f"{value:.2f}x"


def learning_rate(value: float | None) -> str:
    """Format in scientific notation: 8.1e-04."""
    return DASH if value is None else f"{value:.1e}"


def duration(seconds: float | None) -> str:
    """Format with its two largest units: 8s, 3m 10s, 2h 05m, 4d 11h."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    left = max(0, round(seconds))
    for (unit, name), (smaller, smaller_name) in pairwise(_SECONDS):
        if left >= unit:
            return f"{left // unit}{name} {left % unit // smaller:02d}{smaller_name}"
    return f"{left}s"


def size(num_bytes: float) -> str:
    """Format a number of bytes in decimal units: 812 B, 45.2 kB, 1.25 GB."""
    text = rate(num_bytes)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"
