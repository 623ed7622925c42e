"""Write HTML that is also well-formed XML, with foreign text escaped and its control characters shown."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from trainer.console.svg import escaped

# They reorder or hide what stands beside them.
_SHOWN_FORMATS: Final = frozenset(
    "\u00ad\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
)
_SHOWN_CATEGORIES: Final = frozenset({"Cc", "Cs", "Co", "Cn", "Zl", "Zp"})
_ESCAPES: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_SPACE: Final = "\u2423"


Cell = str | float | int | tuple[str, ...] | None
"""Of a table; a tuple is several words, each for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """A table: cells that are numbers are right-aligned and sorted as numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    """Foreign text, as the heads and cells are."""


def spelled(text: str) -> str:
    """Write control, reordering and invisible characters as escapes."""
    return text if text.isascii() and text.isprintable() else "".join(map(_spelled, text))


def spelled_token(text: str) -> str:
    """Write what `spelled` does as escapes, and as signs the spaces at both ends, which are part of a token."""
    inner = text.strip(" ")
    if not inner:
        return _SPACE * len(text) or "(empty)"
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return _SPACE * before + spelled(inner) + _SPACE * after


def foreign(text: str) -> str:
    """Return text of others as markup that neither executes nor reorders anything."""
    return f"<bdi>{quoted(text)}</bdi>"


def quoted(text: str) -> str:
    """Return text of others for an element or between the double quotes of an attribute."""
    return escaped(spelled(text)).replace('"', "&quot;")


def chip(word: str, more: str = "", *, tip: str = "") -> str:
    """Return a word of others in a frame, with a small note after it."""
    small, title = f" <small>{quoted(more)}</small>" if more else "", f' title="{quoted(tip)}"' if tip else ""
    return f'<span class="chip"{title}><bdi>{quoted(spelled_token(word))}</bdi>{small}</span>'


def figure_number(value: float | int | str | None) -> str:
    """Return a value with enough digits to be compared: integers whole, others to five figures."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or (abs(value) < 1e15 and value == int(value)):
        return f"{int(value):,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(int(value))
    return f"{value:.5g}"


def table(content: PageTable) -> str:
    """Return a table that scrolls by itself where the page is narrow."""
    columns = list(zip(*content.rows, strict=True)) or [()] * len(content.heads)
    heads = "".join(_head(head, column) for head, column in zip(content.heads, columns, strict=True))
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in content.rows)
    caption = f"<caption>{quoted(content.caption)}</caption>" if content.caption else ""
    return (
        f'<div class="wide" tabindex="0"><table class="sortable">{caption}<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def section(anchor: str, title: str, note: str, parts: Iterable[str]) -> str:
    """Return a section with its heading and what its numbers mean, or nothing if it has no parts."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    return f'<section id="{anchor}"><h2>{quoted(title)}</h2><p class="note">{quoted(note)}</p>\n{body}\n</section>\n'


def figure(title: str, body: str, *, note: str = "") -> str:
    """Return a figure with its title above it."""
    small = f' <span class="note">{quoted(note)}</span>' if note else ""
    return f"<figure><figcaption>{quoted(title)}{small}</figcaption>\n{body}\n</figure>\n"


def details(title: str, body: str) -> str:
    """Return content that is folded away until it is asked for."""
    return f"<details><summary>{quoted(title)}</summary>\n{body}\n</details>\n"


def grid(parts: Iterable[str]) -> str:
    """Return figures beside each other, as many as the page is wide."""
    body = "".join(parts)
    return f'<div class="grid">\n{body}</div>\n' if body else ""


def maps(parts: Iterable[str]) -> str:
    """Return heat maps beside each other, each as wide as it is."""
    body = "".join(parts)
    return f'<div class="maps">\n{body}</div>\n' if body else ""


def _head(head: str, column: Sequence[Cell]) -> str:
    """Return the head of a column, above its numbers."""
    style = "" if any(isinstance(value, str | tuple) for value in column) else ' class="number"'
    return f'<th scope="col"{style}>{quoted(head)}</th>'


def _cell(value: Cell) -> str:
    if isinstance(value, tuple):
        return f"<td>{''.join(map(chip, value))}</td>"
    if isinstance(value, str):
        return f"<td>{quoted(value)}</td>"
    if value is None:
        return '<td class="number">-</td>'
    return f'<td class="number" data-value="{value!r}">{figure_number(value)}</td>'


def _spelled(character: str) -> str:
    code = ord(character)
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character in _SHOWN_FORMATS or unicodedata.category(character) in _SHOWN_CATEGORIES:
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character
