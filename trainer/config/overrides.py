"""Overrides of the command line, `a.b=c`: a layer over the file with the same rules and messages."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from pydantic_core import PydanticUndefined

from trainer.config import foreign, slots
from trainer.config.base import Config
from trainer.config.hints import meant_value
from trainer.config.layers import merge
from trainer.config.nodes import Finding, Key, Node, SourceLocation, Unreadable, shown
from trainer.config.old_names import FIRST_OVERRIDE
from trainer.config.slots import Slot
from trainer.config.yaml_nodes import MAX_DEPTH, compose

_EXAMPLE: Final = "key=value, such as train.steps=100"
_LOOSE: Final = re.compile(r"([A-Za-z_][\w.]*)(?:\s*:|\s+=|\s+(?!=))[^=]*", re.ASCII)
"""A key and its value in YAML form, or separated by spaces."""
_IN_WORDS: Final = re.compile(r"([\w.-]*)\s*[:=]?(.*)", re.DOTALL)


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

    Returns:
        The new configuration.
    """
    parsed: list[tuple[list[str], Node]] = []
    for number, words in _grouped(overrides, slot.annotation):
        place = SourceLocation(FIRST_OVERRIDE + number, 0, 0, f"<override {number}>")
        try:
            loose = _LOOSE.fullmatch(words[0])
            if len(words) > 1 or (loose and names_key(loose[1], slot.annotation)):
                raise Unreadable(place, _in_words(words, slot.annotation))
            parsed.append(_parse(words[0], place, findings))
        except Unreadable as error:
            findings.append(error.finding)
    parsed.sort(key=lambda one: (0, len(one[0])) if one[0][-1] == "kind" else (1, 0))
    for path, value in parsed:
        try:
            tree = _assign(tree, path, value, slot, ())
        except Unreadable as error:
            findings.append(error.finding)
    return tree


def _grouped(overrides: Sequence[str], root: type[Config]) -> Iterator[tuple[int, list[str]]]:
    """Yield numbered overrides; the words of an override that was typed with spaces stay together."""
    words = list(enumerate(overrides, start=1))
    while words:
        number, word = words.pop(0)
        group = [word]
        is_key = names_key(word.rstrip(":="), root)
        if is_key and "=" not in word and words and words[0][1].startswith("="):
            group.append(words.pop(0)[1])
        is_open = is_key and (group[-1].endswith("=") or len(group) == 1)
        if is_open and words and "=" not in words[0][1] and not names_key(words[0][1], root):
            group.append(words.pop(0)[1])
        yield number, group


def names_key(word: str, root: type[Config]) -> bool:
    """Return whether a word is a dotted key of a schema, or another trainer's name for one."""
    section, _, last = word.rpartition(".")
    return section in slots.homes(root).get(last, ()) or foreign.counterpart(last, section) is not None


def _in_words(words: list[str], root: type[Config]) -> str:
    """Return the message for a key and value typed with spaces or a colon between them."""
    text = " ".join(words)
    match = _IN_WORDS.fullmatch(text)
    assert match is not None, "any text is a match"
    key, value = match[1], match[2].strip()
    advice = _meant(key, value or None, root)
    assert advice is not None, "words are taken together if they begin with a key"
    return f"{shown(text)} is not an override; {advice}, without spaces"


def as_override(option: str, value: str | None, root: type[Config]) -> str:
    """Return the message for an unknown option of the command line, with the override that may have been intended.

    Args:
        option: as typed, with its dashes; or a word that is neither option nor override.
        value: the word after it; None: there was none.
        root: the schema.
    """
    said, key = shown(option)[1:-1], option.lstrip("-").replace("-", "_")
    known = _meant(key, value, root)
    if not option.startswith("-"):
        return f"{said}: is no override; {known or f'write {_EXAMPLE}'}"
    return f"{said}: is no option; {known or 'leave it out'}"


def _meant(key: str, value: str | None, root: type[Config]) -> str | None:
    """Return how to write an override for a key and a value; None if there is no such key."""
    given = "..." if value is None else value
    section, _, last = key.rpartition(".")
    homes = slots.homes(root).get(last, ())
    if section in homes:
        return f"write {key}={given}"
    meant = foreign.counterpart(last, section)
    if meant is None:
        known = [f"{home}.{last}".lstrip(".") for home in homes]
        return f"write {' or '.join(f'{name}={given}' for name in known)}" if 0 < len(known) <= 3 else None
    if not meant.key or meant.note:
        return f"write {meant.key}=...{meant.remark}" if meant.key else meant.note
    options = [option for annotation in slots.at(root, meant.key) for option in slots.literals(annotation)]
    written = f"write {meant.key}={meant_value(given, options) or given}"
    if given.lower() in foreign.ALSO_NEEDED and meant_value(given, options) is not None:
        written += f" {meant.key.rpartition('.')[0]}.{'='.join(foreign.ALSO_NEEDED[given.lower()])}"
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
    if len(parts) > MAX_DEPTH:
        raise Unreadable(place, f"{shown(path)} has {len(parts)} parts; a key has at most {MAX_DEPTH}")
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
        return _as_node(slot.default, place)
    return Node({}, place, place)


def _as_node(value: Any, place: SourceLocation) -> Node:
    if isinstance(value, Config):
        value = value.model_dump()
    if isinstance(value, dict):
        return Node({key: _as_node(inner, place) for key, inner in value.items()}, place, place)
    if isinstance(value, list | tuple):
        return Node([_as_node(inner, place) for inner in value], place, place)
    return Node(None if value is PydanticUndefined else value, place, place)
