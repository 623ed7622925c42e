"""Read YAML text into nodes, which keep the line and column of every value.

Scalars follow the YAML 1.2 core schema: `1e-3` is a number; only true and false are booleans, so `no` and `on` are
text, as are `1:30` and `2024-01-01`; `010` is ten, `0o10` and `0x8` are eight. Duplicate keys, merge keys (`<<`) and
tags outside the core schema are refused. Nothing is constructed but text, numbers, booleans, null, lists and mappings.
"""

import re
from collections.abc import Callable
from typing import Any, Final

import yaml

from trainer.config.nodes import UNUSABLE, Finding, Key, Node, SourceLocation, Unreadable, shown

_CORE: Final = "tag:yaml.org,2002:"
_PLAIN: Final = "plain"
"""Tag of a scalar without quotes and without a tag."""
_NO_ANCHOR: Final = "no anchor"
"""Tag of an alias that stands for nothing."""
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
_MAX_VALUES: Final = 5000
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
    """Read one YAML document; return None if it has only comments.

    Args:
        text: the document.
        locate: makes a location from a 1-based line and column.
        findings: collects problems that do not stop the reading.
        key: place of the document in the configuration.

    Raises:
        Unreadable: if it is not YAML.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        return None if root is None else _Converter(locate, findings).node(root, key)
    except RecursionError:
        raise Unreadable(locate(1, 1), "nested too deeply; a configuration has a few levels", key) from None
    except yaml.reader.ReaderError as error:
        line_start = text.rfind("\n", 0, error.position) + 1
        place = locate(text.count("\n", 0, error.position) + 1, error.position - line_start + 1)
        message = (
            f"character U+{error.character:04X} is not allowed; remove it, or write it as an escape in double quotes"
        )
        raise Unreadable(place, message, key) from None
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or "unknown"
        # For an unclosed token, report where it starts.
        begins_at = error.context_mark if problem.startswith(_ENDLESS) else None
        mark = begins_at or error.problem_mark or error.context_mark
        place = locate(mark.line + 1, mark.column + 1) if mark else locate(1, 1)
        if problem == "but found another document":
            raise Unreadable(place, "a second document; one file is one configuration: remove '---'") from None
        hint = next((hint for start, hint in _HINTS.items() if start in problem), problem)
        raise Unreadable(place, f"not valid YAML: {hint}", key) from None


class _Loader(yaml.SafeLoader):
    """PyYAML's composer, without YAML 1.1's types of plain scalars; an alias cannot stand for what contains it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._complete: set[str | None] = set()

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else f"{_CORE}str"
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        is_alias = self.check_event(yaml.AliasEvent)
        if is_alias and event.anchor not in self._complete:
            self.get_event()
            return yaml.ScalarNode(_NO_ANCHOR, event.anchor, event.start_mark, event.end_mark)
        if not is_alias:
            self.anchors.pop(event.anchor, None)  # YAML allows another value for the same name
        node = super().compose_node(parent, index)
        self._complete.add(event.anchor)
        return node


class _Converter:
    """Converts PyYAML's nodes; problems become findings, and their values UNUSABLE."""

    def __init__(self, locate: Callable[[int, int], SourceLocation], findings: list[Finding]) -> None:
        self._locate, self._findings, self._num_values = locate, findings, 0

    def node(self, node: yaml.Node, key: Key, key_place: SourceLocation | None = None) -> Node:
        place = self._place(node)
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            message = f"more than {_MAX_VALUES} values, aliases written out; a configuration has a few hundred"
            raise Unreadable(place, message)
        written = node.value if node.tag == _PLAIN else None
        return Node(self._value(node, key, place), place, key_place or place, written)

    def _value(self, node: yaml.Node, key: Key, place: SourceLocation) -> Any:
        tag = node.tag.removeprefix(_CORE)
        if tag == _NO_ANCHOR:
            return self._report(place, key, f"alias *{node.value} has no finished &{node.value} before it")
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.node(entry, (*key, i)) for i, entry in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, key)
        if not isinstance(node, yaml.ScalarNode) or tag not in (_PLAIN, *_TYPES):
            written = shown(tag if tag == node.tag else f"!!{tag}")[1:-1]
            return self._report(place, key, f"tag {written} is not allowed; a configuration is plain values: remove it")
        if tag == "str":
            return node.value
        try:
            value = resolve(node.value)
        except ValueError:
            message = f"{shown(node.value)[1:-1]} does not fit in 64 bits; use a smaller number"
            return self._report(place, key, message)
        value = float(value) if tag == "float" and type(value) is int else value
        if tag != _PLAIN and type(value) is not _TYPES[tag]:
            return self._report(place, key, f"{shown(node.value)} is not of its tag !!{tag}; remove the tag")
        return value

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value in node.value:
            place = self._place(key_node)
            part = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            inner = self.node(value, (*key, part), place)
            if not part:
                self._report(place, key, "a key must be text")
            elif part == "<<" and key_node.tag == _PLAIN:
                message = "merge keys (<<) are not supported; repeat the keys, or put them in a base file"
                self._report(place, key, message)
            elif part in entries:
                first = entries[part].key_place.line
                where = f", first on line {first}" if first else ""
                self._report(place, (*key, part), f"key given twice{where}; remove one")
            else:
                entries[part] = inner
        return entries

    def _place(self, node: Any) -> SourceLocation:
        return self._locate(node.start_mark.line + 1, node.start_mark.column + 1)

    def _report(self, place: SourceLocation, key: Key, message: str) -> object:
        self._findings.append(Finding(place, key, message))
        return UNUSABLE
