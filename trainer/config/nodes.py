"""A configuration as it was written: values that know the file, line and column they came from."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from trainer.errors import ConfigError

Key = tuple[str | int, ...]
"""Path of a value in the configuration: keys and list indices from the root."""

MAX_LINES: Final = 100
"""A report ends after this many problems: whoever has more made one mistake, not hundreds."""
MAX_SHOWN: Final = 60
"""Characters of a value that a message repeats."""
MAX_PATH_SHOWN: Final = 300
"""Characters of a path that a message repeats."""
_MAX_PARTS: Final = 12
"""Most parts of a key that a message repeats; no schema is as deep."""
_PLAIN_PART: Final = re.compile(r"[A-Za-z0-9_-]{1,60}")
UNUSABLE: Final = object()
"""Value of a node that was already reported: no type accepts it, and what the schema says of it is not repeated."""


class SourceLocation(NamedTuple):
    """Source location. Locations sort as a reader meets them: the named file, its bases, the overrides."""

    rank: int
    """Order among the sources of one configuration."""
    line: int
    """1-based; 0 means the source as a whole."""
    column: int
    """1-based."""
    source: str
    """The file as the user named it, or `<override 2>`."""

    def __str__(self) -> str:
        """Format as editors and terminals link it."""
        source = shown_path(self.source)
        return f"{source}:{self.line}:{self.column}" if self.line else source


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One value of a configuration: a scalar, a mapping of nodes or a list of nodes."""

    value: Any
    """A scalar, `dict[str, Node]`, `list[Node]` or UNUSABLE."""
    place: SourceLocation
    """Location of the value."""
    key_place: SourceLocation
    """Location of its key; of the value itself for list entries and the root."""
    written: str | None = None
    """A scalar as it was typed, if it was typed without quotes."""

    def plain(self) -> Any:
        """Return the value without its places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def below(self, part: str | int) -> "Node | None":
        """Return the node under a key or a list index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(str(part))
        if isinstance(self.value, list) and str(part).isdecimal() and int(part) < len(self.value):
            return self.value[int(part)]
        return None

    def under_key(self, key_place: SourceLocation) -> "Node":
        """Return the same value under another key."""
        return replace(self, key_place=key_place)


class Finding(NamedTuple):
    """One problem: a line of the report."""

    place: SourceLocation
    key: Key
    """The key that the message is about; empty for the file as a whole."""
    message: str
    """Text of the problem: what is wrong, with the values; what is allowed; what to do."""

    def __str__(self) -> str:
        """Format as one line: where: what is wrong."""
        return f"{self.place}: {dotted(self.key)}: {self.message}" if self.key else f"{self.place}: {self.message}"


class Unreadable(Exception):
    """A source that cannot be read to its end. Its finding is the last of that source."""

    def __init__(self, place: SourceLocation, message: str, key: Key = ()) -> None:
        finding = Finding(place, key, message)
        super().__init__(str(finding))
        self.finding = finding


def dotted(key: Key) -> str:
    """Write a key as overrides do, `data.sources.0.path`; parts that no schema has are quoted and shortened."""
    text = ".".join(str(part) if _PLAIN_PART.fullmatch(str(part)) else shown(part) for part in key[:_MAX_PARTS])
    return text if len(key) <= _MAX_PARTS else f"{text}...."


def shown(value: object) -> str:
    """Write a value for a message: on one line, shortened."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            text = repr(value[: MAX_SHOWN + 1])
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]}...{text[-1] if isinstance(value, str) else ''}"


def shown_path(path: object) -> str:
    """Write a path for a message: as it is, so that it can be copied, unless it would flood or steer a terminal."""
    text = str(path)
    return text if text.isprintable() and len(text) <= MAX_PATH_SHOWN else shown(text)


def report(findings: Iterable[Finding]) -> ConfigError:
    """Make one error of all findings: a line for each, in the order a reader meets their places."""
    lines = list(dict.fromkeys(str(f) for f in sorted(findings, key=lambda f: f.place)))
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"... and {len(lines) - MAX_LINES} more"]
    return ConfigError("\n".join(lines))
