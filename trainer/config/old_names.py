"""Replace old names of keys and values by their present ones, with a warning for each.

`Config.old_names` lists them. They are replaced before the configuration is validated, so that errors show the present
name, at the location of the old one.
"""

import warnings
from dataclasses import replace

from trainer.config import slots
from trainer.config.base import Renamed
from trainer.config.dump import inline
from trainer.config.nodes import Finding, Key, Node
from trainer.config.slots import Slot

FIRST_OVERRIDE = 1_000_000
"""Rank of the first override: overrides come after all files in a report, and replace their values."""


class OldNameWarning(FutureWarning):
    """Warning about an old name of a key or value."""


def with_present_names(node: Node, slot: Slot, findings: list[Finding], key: Key = ()) -> Node:
    """Return a configuration with old names replaced.

    Args:
        node: the configuration or a part of it; it may lack a `kind` that another layer has.
        slot: schema of `node`.
        findings: collects a problem for each key that is given under both of its names.
        key: path of `node`.
    """
    if isinstance(node.value, list):
        parts = enumerate(node.value)
        entries = [with_present_names(part, slots.entry(slot, i), findings, (*key, i)) for i, part in parts]
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
        other = node.value.get(renamed.key) if renamed.key != name else None
        if other is not None and _is_override(other) == _is_override(inner):
            message = f"is the old name of {renamed.key}, which is given as well; remove it"
            findings.append(Finding(inner.key_place, (*key, name), message))
            continue
        if renamed.key != name or present is not inner:
            _warn(inner, present, old=(*key, name), new=renamed.key)
        if other is None or _is_override(inner):
            value[renamed.key] = present
    return replace(node, value=value)


def _renamed(node: Node, slot: Slot, name: str) -> Renamed | None:
    """Return the new name of an old key of this node's kind or, if the node states none, of any kind."""
    stated = slots.section_of(slot, slots.kind_of(node, slot))
    others = slots.sections(slot.annotation) if node.below("kind") is None else []
    for section in [*([] if stated is None else [stated]), *others]:
        if name in section.old_names:
            return section.old_names[name]
        if name in section.model_fields:
            return None
    return None


def _is_override(node: Node) -> bool:
    return node.key_place.rank >= FIRST_OVERRIDE


def _warn(before: Node, after: Node, *, old: Key, new: str) -> None:
    if after is before:
        old, change = old[:-1], f"{old[-1]} is now called {new}"
    else:
        present = inline(after.value) if new == old[-1] else f"{new}: {inline(after.value)}"
        change = f"{inline(before.value)} is now {present}"
    message = str(Finding(before.key_place, old, f"{change}; the old name still works"))
    warnings.warn(message, OldNameWarning, stacklevel=2)
