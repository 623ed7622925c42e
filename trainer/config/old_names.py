"""Accept the former names of keys and values, each with a warning that states the present one.

A section lists them in `Config.old_names`. They are replaced before anything else looks at a configuration, so that
every message is about the present name, at the place where the old one was written.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace

from trainer.config import slots
from trainer.config.base import Config, Renamed
from trainer.config.dump import inline
from trainer.config.nodes import Finding, Key, Node, dotted
from trainer.config.slots import Slot

FIRST_OVERRIDE = 1_000_000
"""Rank of the first override: overrides are reported after all files, and replace what these have."""


class OldNameWarning(FutureWarning):
    """A configuration uses a former name of a key or of a value."""


def with_present_names(node: Node, slot: Slot, findings: list[Finding], key: Key = ()) -> Node:
    """Return a configuration with former names replaced.

    Args:
        node: the configuration, or a part of it; a `kind` may be missing that another file has.
        slot: schema of this place.
        findings: receives a problem for each key that is given under both of its names.
        key: path of this place.
    """
    if isinstance(node.value, list):
        entries = [
            with_present_names(entry, slots.entry(slot, i), findings, (*key, i)) for i, entry in enumerate(node.value)
        ]
        return replace(node, value=entries)
    if not isinstance(node.value, dict):
        return node
    value: dict[str, Node] = {}
    for name, inner in node.value.items():
        renamed = _renamed(node, slot, name)
        if renamed is None:
            value[name] = with_present_names(inner, slots.below(slot, node, name), findings, (*key, name))
            continue
        present = replace(inner, value=renamed.value(inner.value), written=None)
        if present.value == inner.value:
            present = inner
        if renamed.key != name or present is not inner:
            _warn(inner, present, old=(*key, name), new=renamed.key)
        other = node.value.get(renamed.key) if renamed.key != name else None
        if other is not None and _is_override(other) == _is_override(inner):
            findings.append(
                Finding(
                    inner.key_place,
                    (*key, name),
                    f"is the old name of {renamed.key}, which is given as well; remove it",
                )
            )
        elif other is None or _is_override(inner):
            value[renamed.key] = present
    return replace(node, value=value)


def _renamed(node: Node, slot: Slot, name: str) -> Renamed | None:
    """Return the present name of a key, if it has one under this node's kind or, where no kind is given, any."""
    for section in _sections(node, slot):
        if name in section.old_names:
            return section.old_names[name]
        if name in section.model_fields:
            return None
    return None


def _sections(node: Node, slot: Slot) -> Iterator[type[Config]]:
    section = slots.section_of(slot, slots.kind_of(node, slot))
    if section is not None:
        yield section
    if node.below("kind") is None:
        yield from slots.sections(slot.annotation)


def _is_override(node: Node) -> bool:
    return node.key_place.rank >= FIRST_OVERRIDE


def _warn(before: Node, after: Node, *, old: Key, new: str) -> None:
    if after is before:
        change = f"is now {new}"
    else:
        present = inline(after.value) if new == old[-1] else f"{new}: {inline(after.value)}"
        change = f"{inline(before.value)} is now {present}"
    warnings.warn(
        f"{before.key_place}: {dotted(old)}: {change}; the old name still works", OldNameWarning, stacklevel=2
    )
