"""Command-line overrides, `a.b=c`: a layer over the file with the same rules and messages."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from trainer.config import foreign, slots
from trainer.config.base import Config
from trainer.config.hints import meant_value
from trainer.config.layers import merge
from trainer.config.nodes import Finding, Key, Node, SourceLocation, Unreadable, shown
from trainer.config.old_names import FIRST_OVERRIDE
from trainer.config.slots import Slot
from trainer.config.yaml_nodes import compose

_MAX_PARTS: Final = 32
_EXAMPLE: Final = "key=value, such as train.steps=100"


def apply(tree: Node, overrides: Sequence[str], slot: Slot, findings: list[Finding]) -> Node:
    """Apply overrides to a configuration.

    A value is read as YAML, so `[a, b]`, `{kind: dense}`, `null` and `"64"` mean what they mean in a file. A number in
    the path is a list index. Each override acts as a file with that one key would; those that set a `kind` act first,
    so that the options of a new kind can be given in any order.

    Args:
        tree: the configuration.
        overrides: as typed.
        slot: schema of the whole configuration.
        findings: collects one problem for each unreadable override.
    """
    parsed: list[tuple[list[str], Node]] = []
    for number, text in enumerate(overrides, start=1):
        try:
            parsed.append(_parse(text, SourceLocation(FIRST_OVERRIDE + number, 0, 0, f"<override {number}>"), findings))
        except Unreadable as error:
            findings.append(error.finding)
    parsed.sort(key=lambda one: (0, len(one[0])) if one[0][-1] == "kind" else (1, 0))
    for path, value in parsed:
        try:
            tree = _assign(tree, path, value, slot, ())
        except Unreadable as error:
            findings.append(error.finding)
    return tree


def names_key(word: str, root: type[Config]) -> bool:
    """Return whether a word is a dotted key of a schema, or another trainer's name for one."""
    section, _, last = word.rpartition(".")
    return section in slots.homes(root).get(last, ()) or foreign.counterpart(last, section) is not None


def as_override(option: str, value: str | None, root: type[Config]) -> str:
    """Return the message for an unknown option of the command line, with the override that may have been intended.

    Args:
        option: as typed, with its dashes; or a word that is neither option nor override.
        value: the word after it; None: there was none.
        root: the schema.
    """
    hint = _intended(option.lstrip("-").replace("-", "_"), "..." if value is None else value, root)
    if not option.startswith("-"):
        return f"{shown(option)[1:-1]}: is not an override; {hint or f'write {_EXAMPLE}'}"
    return f"{shown(option)[1:-1]}: is not an option; {hint or 'leave it out'}"


def _intended(key: str, value: str, root: type[Config]) -> str | None:
    """Return how to write an override for a key and a value; None if there is no such key."""
    section, _, last = key.rpartition(".")
    homes = slots.homes(root).get(last, ())
    if section in homes:
        return f"write {key}={value}"
    ours = foreign.counterpart(last, section)
    if ours is None:
        keys = [f"{home}.{last}".lstrip(".") for home in homes]
        return f"write {' or '.join(f'{name}={value}' for name in keys)}" if 0 < len(keys) <= 3 else None
    if not ours.key or ours.note:
        return f"write {ours.key}=...{ours.remark}" if ours.key else ours.note
    options = [option for annotation in slots.at(root, ours.key) for option in slots.literals(annotation)]
    our_value = meant_value(value, options)
    written = f"write {ours.key}={our_value or value}"
    if value.lower() in foreign.ALSO_NEEDED and our_value is not None:
        written += f" {ours.key.rpartition('.')[0]}.{'='.join(foreign.ALSO_NEEDED[value.lower()])}"
    return written


def _parse(text: str, place: SourceLocation, findings: list[Finding]) -> tuple[list[str], Node]:
    path, equals, value = text.partition("=")
    bare = path.lstrip("-")
    if not equals or not bare:
        raise Unreadable(place, f"{shown(text)} is not an override; write {_EXAMPLE}")
    if bare != path:
        raise Unreadable(place, f"{shown(text)}: an override has no dashes; write {shown(text.lstrip('-'))[1:-1]}")
    parts = path.split(".")
    if not all(part and part.strip() == part for part in parts):
        raise Unreadable(
            place, f"{shown(path)} is not a key; write names joined by dots, such as model.moe.num_experts"
        )
    if len(parts) > _MAX_PARTS:
        raise Unreadable(place, f"{shown(path)} has {len(parts)} parts; a key has at most {_MAX_PARTS}")
    if parts[0] == "base":
        raise Unreadable(place, "base belongs in a file; name another file, or override the keys themselves", ("base",))
    node = compose(value, lambda line, column: place, findings, tuple(parts))
    return parts, node or Node(None, place, place, "")


def _assign(node: Node | None, path: list[str], value: Node, slot: Slot, done: Key) -> Node:
    if path == ["kind"]:  # can replace the whole section
        path, value = [], Node({"kind": value}, value.place, value.place)
    if not path:
        return value if node is None else merge(node, value, slot)
    part, rest = path[0], path[1:]
    if node is None or node.value is None:
        node = _default(slot, value.place)
    elif not isinstance(node.value, dict | list):
        node = Node({}, value.place, value.place)
    if isinstance(node.value, list):
        index = int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else len(node.value)
        if index >= len(node.value):
            allowed = f"an index from 0 to {len(node.value) - 1}" if node.value else "[...], since it is empty"
            raise Unreadable(
                value.place, f"{shown(part)[1:-1]} is not an entry of this list; use {allowed}", (*done, part)
            )
        entries = list(node.value)
        entries[index] = _assign(entries[index], rest, value, slots.entry(slot, index), (*done, index))
        return replace(node, value=entries)
    below = _assign(node.value.get(part), rest, value, slots.below(slot, node, part), (*done, part))
    return replace(node, value={**node.value, part: below})


def _default(slot: Slot, place: SourceLocation) -> Node:
    """Return the value that an override changes if the file has none: the default list, or an empty section."""
    if isinstance(slot.default, list | tuple):
        return as_node(slot.default, place)
    return Node({}, place, place)


def as_node(value: Any, place: SourceLocation) -> Node:
    """Return the nodes of a Python value or a section, all at one place."""
    if isinstance(value, Config):
        value = value.model_dump()
    if isinstance(value, dict):
        value = {key: as_node(inner, place) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        value = [as_node(inner, place) for inner in value]
    return Node(value, place, place)
