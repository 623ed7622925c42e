"""Turn pydantic's validation errors into findings, each at its place in the file, in our own wording."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.config import foreign, slots, wording
from trainer.config.base import Config
from trainer.config.nodes import UNUSABLE, Finding, Key, Node, dotted
from trainer.config.slots import Slot

_RANGES: Final = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


class _Spot(NamedTuple):
    """One pydantic error and its place in the configuration and the schema."""

    details: ErrorDetails
    key: Key
    node: Node | None
    slot: Slot
    outer: Slot
    """Schema of the section or list around the place."""
    section: type[Config] | None
    """Section that contains the last key."""
    siblings: list[type[Config]]
    """Sections that a `kind` chooses from, `section` among them."""
    union: tuple[Key, Slot] | None
    """Place and schema of the union of types that reported the error."""
    branch: str
    """Type of the union that reported the error."""


def explain(error: ValidationError, tree: Node, root: type[Config]) -> list[Finding]:
    """Return one finding for each problem that validating `tree` against `root` has found."""
    spots = [_locate(details, tree, root) for details in error.errors(include_url=False)]
    spots = [spot for spot in spots if not _was_reported(spot.node)]
    # If the kind itself is wrong, errors about the other options are meaningless.
    lost = {spot.key[:-1] for spot in spots if spot.key[-1:] == ("kind",) and spot.details["type"] == "literal_error"}
    findings: list[Finding] = []
    unions: dict[Key, list[_Spot]] = defaultdict(list)
    for spot in spots:
        if spot.union is not None:
            unions[spot.union[0]].append(spot)
        elif spot.details["type"] != "extra_forbidden" or spot.key[:-1] not in lost:
            findings.extend(_findings(spot, tree, root))
    for branches in unions.values():
        findings.extend(_union_findings(branches, tree, root))
    return findings


def _locate(details: ErrorDetails, tree: Node, root: type[Config]) -> _Spot:
    """Follow a pydantic location, which has union members among the keys, through schema and configuration."""
    key: Key = ()
    node: Node | None = tree
    slot = outer = Slot(root)
    section: type[Config] | None = None
    siblings: list[type[Config]] = []
    union: tuple[Key, Slot] | None = None
    branch = ""
    parts = list(details["loc"])
    while parts:
        siblings = slots.sections(slot.annotation)
        section = siblings[0] if siblings else None
        options = slots.alternatives(slot.annotation)
        if len(options) > 1 or slots.plugin(slot.annotation, parts[0]) is not None:
            label = parts.pop(0)
            if len(siblings) == len(options):
                section = slots.section_of(slot, label)
            else:
                union, branch = (key, slot), str(label)
            if not parts:
                break
        part = parts.pop(0)
        outer, slot = slot, slots.entry(slot, part) if isinstance(part, int) else slots.named(slot, section, part)
        key = (*key, part)
        node = node.below(part) if node is not None else None
    return _Spot(details, key, node, slot, outer, section, siblings, union, branch)


def _was_reported(node: Node | None) -> bool:
    return node is not None and (node.value is UNUSABLE or _was_reported(node.below("kind")))


def _union_findings(spots: list[_Spot], tree: Node, root: type[Config]) -> Iterator[Finding]:
    """Report the errors of the intended type of a union; if the value has none of the types, report only that."""
    branches: dict[str, list[_Spot]] = defaultdict(list)
    for spot in spots:
        branches[spot.branch].append(spot)
    for found in branches.values():
        if not any(spot.union is not None and spot.key == spot.union[0] and _is_type_error(spot) for spot in found):
            yield from (finding for spot in found for finding in _findings(spot, tree, root))
            return
    assert spots[0].union is not None, "only union errors reach this function"
    key, slot = spots[0].union
    node = _nearest(tree, key)
    yield Finding(node.place, key, wording.wrong_type(node, slot.annotation))


def _is_type_error(spot: _Spot) -> bool:
    kind = spot.details["type"]
    return kind.endswith(("_type", "_parsing")) or kind in ("int_from_float", "literal_error")


def _findings(spot: _Spot, tree: Node, root: type[Config]) -> Iterator[Finding]:
    context = spot.details.get("ctx", {})
    key, node, kind = spot.key, spot.node, spot.details["type"]
    if kind == "problems":
        for problem in context["found"]:
            at = (*key, *(problem.key.split(".") if problem.key else ()))
            yield Finding(_nearest(tree, at).key_place, at, problem.message)
    elif kind == "missing" and isinstance(key[-1], int):
        pair = _nearest(tree, key[:-1])
        yield Finding(pair.place, key[:-1], wording.wrong_length(pair, spot.outer.annotation))
    elif kind == "missing":
        yield Finding(_nearest(tree, key).key_place, key, "required key is missing; add it")
    elif node is None:  # an invalid default
        yield Finding(_nearest(tree, key).key_place, key, spot.details["msg"])
    elif kind == "extra_forbidden":
        assert spot.section is not None, "only sections have keys"
        yield from _unknown(key, node, spot.section, spot.siblings, root)
    elif kind == "union_tag_not_found":
        options = slots.all_kinds(spot.slot.annotation)
        yield Finding(node.key_place, key, f"needs a kind; add kind: with one of {', '.join(options)}")
    elif kind in ("plugin", "union_tag_invalid"):
        tag = node.below("kind") or node
        text = context.get("text") or wording.choice(tag.value, slots.all_kinds(spot.slot.annotation))
        yield Finding(tag.place, (*key, "kind"), text)
    else:
        yield Finding(node.place, key, _about_value(spot, node, context))


def _unknown(
    key: Key, node: Node, section: type[Config], siblings: list[type[Config]], root: type[Config]
) -> Iterator[Finding]:
    """Report an unknown key; for a section of another trainer, each key in it."""
    name, where = str(key[-1]), dotted(key[:-1])
    if name in foreign.SECTIONS and isinstance(node.value, dict) and node.value:
        for part, inner in node.value.items():
            message = wording.unknown_key(part, root, [], root, where=name, node=inner)
            yield Finding(inner.key_place, (*key, part), message)
    else:
        message = wording.unknown_key(name, section, siblings, root, where=where, node=node)
        yield Finding(node.key_place, key, message)


def _about_value(spot: _Spot, node: Node, context: dict[str, Any]) -> str:
    kind = spot.details["type"]
    if kind == "literal_error":
        return wording.choice(node.value, slots.literals(spot.slot.annotation))
    if _is_type_error(spot):
        return wording.wrong_type(node, spot.slot.annotation)
    if kind in _RANGES:
        name, words = _RANGES[kind]
        limit = context[name]
        limit = int(limit) if float(limit).is_integer() else limit
        return f"must be {words} {limit}, got {wording.given(node)}"
    if kind == "finite_number":
        return f"must be a finite number, got {wording.given(node)}"
    if kind == "string_pattern_mismatch":
        return wording.pattern(str(node.value), context["pattern"])
    if context.get("field_type") == "Tuple":
        return wording.wrong_length(node, spot.slot.annotation)
    if context.get("min_length") == 1:
        return f"must not be empty; write {'some text' if isinstance(node.value, str) else 'an entry, or remove it'}"
    if kind.endswith(("too_short", "too_long")):
        bound = f"at least {context['min_length']}" if kind.endswith("short") else f"at most {context['max_length']}"
        return f"must have {bound} {'characters' if 'string' in kind else 'entries'}, got {len(node.value)}"
    if kind in ("file", "plugin_function"):  # about another file, which the message names
        return str(context["text"])
    if kind == "value_error":  # from a validator of ours, whose message continues after the text
        return f"{wording.given(node)} {context['error']}"
    # A constraint that no section uses yet: pydantic's message.
    return f"{spot.details['msg'][:1].lower()}{spot.details['msg'][1:]}, got {wording.given(node)}"


def _nearest(tree: Node, key: Key) -> Node:
    """Return the node of a key, or of the innermost section around it that exists."""
    for part in key:
        if (inner := tree.below(part)) is None:
            break
        tree = inner
    return tree
