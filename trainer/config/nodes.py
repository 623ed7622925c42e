"""Nodes of a configuration: values with their file, line and column; and the problems found in them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from trainer.errors import ConfigError

Key = tuple[str | int, ...]
"""Path of a value in the configuration: keys and list indices from the root."""

MAX_SHOWN: Final = 60
"""Longest value in a message, in characters."""
MAX_PATH_SHOWN: Final = 300
"""Longest path in a message, in characters."""
_PLAIN_PART: Final = re.compile(r"[A-Za-z0-9_-]{1,60}")
UNUSABLE: Final = object()
"""Value of a node that was already reported; further errors about it are dropped."""


class SourceLocation(NamedTuple):
    """Source location; sorts in the order of reading: the named file, its bases, the overrides."""

    rank: int
    """Order among the sources of one configuration."""
    line: int
    """1-based; 0 means the source as a whole."""
    column: int
    """1-based."""
    source: str
    """The file as the user named it, or `<override 2>`."""

    def __str__(self) -> str:
        """Format as file:line:column, which editors and terminals link."""
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
    """Text of an unquoted scalar."""

    def plain(self) -> Any:
        """Return the plain value."""
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


class Finding(NamedTuple):
    """One problem: a line of the report."""

    place: SourceLocation
    key: Key
    """Key that the message is about; empty for the whole file."""
    message: str
    """Text of the problem: what is wrong, with the values; what is allowed; what to do."""

    def __str__(self) -> str:
        """Format as one line."""
        return f"{self.place}: {dotted(self.key)}: {self.message}" if self.key else f"{self.place}: {self.message}"


class Unreadable(Exception):
    """A source that cannot be read to its end; its finding is the last of that source."""

    def __init__(self, place: SourceLocation, message: str, key: Key = ()) -> None:
        self.finding = Finding(place, key, message)
        super().__init__(str(self.finding))


def dotted(key: Key) -> str:
    """Write a key in dotted form, `data.sources.0.path`; unusual parts are quoted and shortened."""
    return ".".join(str(part) if _PLAIN_PART.fullmatch(str(part)) else shown(part) for part in key)


def shown(value: object) -> str:
    """Write a value for a message, on one line and shortened."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value[: MAX_SHOWN + 1]) if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]}...{text[-1] if isinstance(value, str) else ''}"


def shown_path(path: object) -> str:
    """Write a path for a message: unchanged, for copying, unless it is too long or has control characters."""
    text = str(path)
    return text if text.isprintable() and len(text) <= MAX_PATH_SHOWN else shown(text)


def report(findings: Iterable[Finding]) -> ConfigError:
    """Return one error with a line for each finding, in reading order."""
    lines = list(dict.fromkeys(str(f) for f in sorted(findings, key=lambda f: f.place)))
    return ConfigError("\n".join(lines))
