"""YAML text to nodes: PyYAML scans and parses; its own constructors would lose the places of values.

Scalars follow the YAML 1.2 core schema: `1e-3` is a number; only true and false are booleans, so `no` and `on` are
text, as are `1:30` and `2024-01-01`; `010` is ten, `0o10` and `0x8` are eight. Duplicate keys, merge keys (`<<`) and
tags outside the core schema are refused; aliases are followed up to a total size. Nothing is ever constructed but text,
numbers, booleans, null, lists and mappings.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import yaml

from trainer.config.nodes import UNUSABLE, Finding, Key, Node, SourceLocation, Unreadable, shown

MAX_NODES: Final = 5_000
"""Most values of a configuration, aliases expanded: a ten-line alias bomb expands to a billion."""
MAX_DEPTH: Final = 32
"""Deepest nesting."""

_CORE: Final = "tag:yaml.org,2002:"
_TYPES: Final = {"str": str, "int": int, "float": float, "bool": bool, "null": type(None)}
_NULLS: Final = {"", "~", "null", "Null", "NULL"}
_BOOLS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"([-+]?)\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_INT64: Final = 2**63
_HINTS: Final = {
    "found character '\\t'": "a tab; YAML is indented with spaces: replace it",
    "mapping values are not allowed": "a second ': ' in one value; put text in quotes, or check the indentation",
    "expected the node content": "a value is missing, or a [ or { is not closed",
    "expected <block end>": "this line is indented differently from its neighbours; line them up",
    "could not find expected ':'": "a key without ': '; write key: value, with the space",
    "expected ',' or": "a [ or { is not closed, or a comma is missing; entries are separated by commas",
    "found unexpected end of stream": "a quote is not closed",
    "found undefined tag handle": "tags (!name) are not allowed; remove it, or put the text in quotes",
    "cannot start any token": "a value cannot start with this character; put it in quotes",
}
_ENDLESS: Final = ("could not find expected ':'", "found unexpected end of stream")


def resolve(text: str) -> Any:
    """Return the value of an unquoted scalar.

    Raises:
        ValueError: if it is a whole number that does not fit in 64 bits.
    """
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        # Python itself refuses to convert thousands of digits.
        value = int(text, 0) if text[:2] in ("0o", "0x") else int(text) if len(text) < 100 else _INT64
        if not -_INT64 <= value < _INT64:
            raise ValueError(text)
        return value
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _NOT_FINITE.fullmatch(text):
        return float("nan") if match[1] is None else float(f"{match[1]}inf")
    return text


def compose(
    text: str, locate: Callable[[int, int], SourceLocation], findings: list[Finding], key: Key = ()
) -> Node | None:
    """Read one YAML document.

    Args:
        text: the document.
        locate: makes a location from a 1-based line and column.
        findings: collects problems that do not stop the reading.
        key: place of the document in the configuration.

    Returns:
        The root node, or None if the text has only comments.

    Raises:
        Unreadable: if it is not YAML, or too large, or nested too deeply.
    """
    try:
        return _Composer(text, locate, findings).document(key)
    except yaml.reader.ReaderError as error:
        line_start = text.rfind("\n", 0, error.position) + 1
        place = locate(text.count("\n", 0, error.position) + 1, error.position - line_start + 1)
        character = error.character if isinstance(error.character, int) else ord(error.character)
        message = f"character U+{character:04X} is not allowed; remove it, or write it as an escape in double quotes"
        raise Unreadable(place, message, key) from None
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or "unknown"
        # For an unclosed token, report where it starts.
        begins_at = error.context_mark if problem.startswith(_ENDLESS) else None
        mark = begins_at or error.problem_mark or error.context_mark
        hint = next((hint for start, hint in _HINTS.items() if start in problem), problem)
        place = locate(mark.line + 1, mark.column + 1) if mark else locate(1, 1)
        raise Unreadable(place, f"not valid YAML: {hint}", key) from None


class _Composer:
    def __init__(self, text: str, locate: Callable[[int, int], SourceLocation], findings: list[Finding]) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._locate = locate
        self._findings = findings
        self._anchors: dict[str, tuple[Node, int]] = {}  # with their sizes
        self._size = 0

    def document(self, key: Key) -> Node | None:
        next(self._events)  # start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        root = self._node(next(self._events), key, None)
        next(self._events)  # end of the document
        if not isinstance(following := next(self._events), yaml.StreamEndEvent):
            raise Unreadable(self._place(following), "a second document; one file is one configuration: remove '---'")
        return root

    def _place(self, event: yaml.Event) -> SourceLocation:
        mark = event.start_mark
        assert mark is not None, "only events that are not read from a text have no mark"
        return self._locate(mark.line + 1, mark.column + 1)

    def _found(self, place: SourceLocation, key: Key, message: str) -> None:
        self._findings.append(Finding(place, key, message))

    def _grow(self, size: int, event: yaml.Event) -> None:
        self._size += size
        if self._size > MAX_NODES:
            message = f"more than {MAX_NODES} values, aliases written out; a configuration has a few hundred"
            raise Unreadable(self._place(event), message)

    def _node(self, event: yaml.Event, key: Key, key_place: SourceLocation | None, depth: int = 0) -> Node:
        place = self._place(event)
        key_place = key_place or place
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                self._found(place, key, f"alias *{event.anchor} has no finished &{event.anchor} before it")
                return Node(UNUSABLE, place, key_place)
            node, size = self._anchors[event.anchor]
            self._grow(size, event)
            return node.under_key(key_place)
        if depth > MAX_DEPTH:
            raise Unreadable(place, f"nested more than {MAX_DEPTH} levels deep")
        size_before = self._size
        self._grow(1, event)
        value: Any
        written: str | None = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, place, key)
            written = event.value if event.implicit[0] else None
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._list(key, depth)
            value = value if self._tag_is_core(event, place, key, "seq") else UNUSABLE
        else:
            value = self._mapping(key, depth)
            value = value if self._tag_is_core(event, place, key, "map") else UNUSABLE
        node = Node(value, place, key_place, written)
        if isinstance(event, yaml.NodeEvent) and event.anchor:
            self._anchors[event.anchor] = (node, self._size - size_before)
        return node

    def _tag_is_core(self, event: Any, place: SourceLocation, key: Key, *names: str) -> bool:
        if event.tag is None or event.tag in {_CORE + name for name in names}:
            return True
        tag = f"!!{event.tag.removeprefix(_CORE)}" if event.tag.startswith(_CORE) else event.tag
        self._found(place, key, f"tag {shown(tag)[1:-1]} is not allowed; a configuration is plain values: remove it")
        return False

    def _scalar(self, event: yaml.ScalarEvent, place: SourceLocation, key: Key) -> Any:
        if not self._tag_is_core(event, place, key, *_TYPES):
            return UNUSABLE
        if not event.implicit[0] and event.tag in (None, f"{_CORE}str"):
            return event.value
        try:
            value = resolve(event.value)
        except ValueError:
            self._found(place, key, f"{shown(event.value)[1:-1]} does not fit in 64 bits; use a smaller number")
            return UNUSABLE
        if event.tag is not None:
            name = event.tag.removeprefix(_CORE)
            value = float(value) if name == "float" and type(value) is int else value
            if type(value) is not _TYPES[name]:
                self._found(place, key, f"{shown(event.value)} is not of its tag !!{name}; remove the tag")
                return UNUSABLE
        return value

    def _list(self, key: Key, depth: int) -> list[Node]:
        entries: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            entries.append(self._node(event, (*key, len(entries)), None, depth + 1))
        return entries

    def _mapping(self, key: Key, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            place = self._place(event)
            part, is_plain = "", False
            if isinstance(event, yaml.ScalarEvent):
                part, is_plain = event.value, event.implicit[0]
            else:
                self._node(event, key, None, depth + 1)
            node = self._node(next(self._events), (*key, part) if part else key, place, depth + 1)
            if not part:
                self._found(place, key, "a key must be text")
            elif part == "<<" and is_plain:
                self._found(
                    place, key, "merge keys (<<) are not supported; repeat the keys, or put them in a base file"
                )
            elif part in entries:
                first = entries[part].key_place.line
                where = f", first on line {first}" if first else ""
                self._found(place, (*key, part), f"key given twice{where}; remove one")
            else:
                entries[part] = node
        return entries
