"""The words of messages: what a type is called, what a reader may have meant."""

import difflib
import re
from typing import Any, Literal, get_args, get_origin

from trainer.config import foreign, slots
from trainer.config.base import LINE_PATTERN, PATH_PATTERN, Config
from trainer.config.nodes import Node, shown
from trainer.config.yaml_nodes import resolve

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_WORDS_OF_BOOLS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_MAX_ELSEWHERE = 3
_NULLS = frozenset({"none", "never", "off", "no", "nil", "disabled"})
_SAME_WORD = 0.6
"""Similarity from which two words may be one, misspelled."""
_NAME_PATTERN = re.compile(r"\^\[A-Za-z0-9\]\[A-Za-z0-9\._-\]\{0,(\d+)\}\$")


def choice(value: object, options: list[str]) -> str:
    """Say that a value is none of `options`."""
    if len(options) == 1:
        return f"must be {options[0]}, got {shown(value)}"
    text = "null" if value is None else str(value).lower()
    hint = ""
    if text in foreign.NO_HALF and "bfloat16" in options:
        hint = "; there is no float16: use bfloat16"
    elif (similar := _meant_value(text, options) or near(text, options, cutoff=0.6)) is not None:
        hint = f"; did you mean {similar}?"
    return f"{shown(value)} is not one of {', '.join(options)}{hint}"


def _meant_value(text: str, options: list[str]) -> str | None:
    """Return what another trainer means by a value, where that is one of the options."""
    meant = foreign.VALUES.get(text)
    return meant if meant in options else None


def unknown_key(
    key: str, section: type[Config], siblings: list[type[Config]], root: type[Config], *, where: str = ""
) -> str:
    """Say that a section has no such key, and where the reader may have meant to go.

    Args:
        key: the key.
        section: the section it was found in.
        siblings: the sections that a `kind` chooses from, `section` among them.
        root: the whole schema.
        where: dotted key of the section.
    """
    options = list(section.model_fields)
    owners = [kind for other in siblings if key in other.model_fields for kind in slots.kinds(other)]
    if owners:
        kind = section.model_fields["kind"].default
        return f"unknown key for kind: {kind}; it is an option of kind: {' or '.join(owners)}"
    if key == "base":
        return "unknown key; base belongs to the top level"
    homes = slots.homes(root)
    first, _, last = key.rpartition(".")
    if last in homes and all(part in homes for part in first.split(".")):
        nested = "".join(f"{part}: {{" for part in first.split("."))
        return f"unknown key; dots are for overrides: write {nested}{last}: ...{'}' * (first.count('.') + 1)}"
    if (meant := foreign.meant_by(key, where)) is not None and (not meant.key or exists(meant.key, root)):
        return f"unknown key; {meant}"
    elsewhere = _elsewhere(key, homes)
    if elsewhere == [key]:
        return f"unknown key; {key} belongs to the top level"
    if 0 < len(elsewhere) <= _MAX_ELSEWHERE:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    if similar := _near_key(key, options, homes):
        return f"unknown key; did you mean {similar}?"
    return f"unknown key; use {_any_of(options)}"


def exists(key: str, root: type[Config]) -> bool:
    """Tell whether a schema has a dotted key, under any kind of the sections on the way."""
    section, _, last = key.rpartition(".")
    return section in slots.homes(root).get(last, frozenset())


def expected(annotation: Any) -> str:
    """Name the values that a type accepts."""
    names = [_name(one) for one in slots.alternatives(annotation)]
    return " or ".join(dict.fromkeys([*names, "null"] if slots.accepts_null(annotation) else names))


def wrong_type(node: Node, annotation: Any) -> str:
    """Say that a value is of another type than the schema's, and how to write it."""
    hint = _how_to_write(node, annotation)
    return f"expected {expected(annotation)}, got {given(node)}" + (f"; {hint}" if hint else "")


def wrong_length(node: Node, annotation: Any) -> str:
    """Say that a list of fixed length has another."""
    return f"expected {expected(annotation)}, got a list of {len(node.value)}"


def given(node: Node) -> str:
    """Repeat a value as its author wrote it."""
    if node.written and not isinstance(node.value, str):
        return shown(node.written)[1:-1]
    return shown(node.value)


def pattern(value: str, expression: str) -> str:
    """Say that text does not have its form."""
    if match := _NAME_PATTERN.fullmatch(expression):
        most = int(match[1]) + 1
        allowed = f"at most {most} letters, digits, '.', '_' and '-', starting with a letter or a digit"
        return f"{shown(value)} is not a name; use {allowed}"
    if expression == PATH_PATTERN:
        return f"{shown(value)} is not a path; use at most 1000 characters, none of them a control character"
    if expression == LINE_PATTERN:
        return f"{shown(value)} has a line break or another control character; write it in one line"
    return f"{shown(value)} does not have the form {expression}"


def _elsewhere(key: str, homes: dict[str, frozenset[str]]) -> list[str]:
    """Return the dotted keys of this name, or that it is the last two parts of: eval_every for eval.every."""
    found = [f"{home}.{key}".lstrip(".") for home in homes.get(key, ())]
    joined = [
        f"{home}.{name}"
        for name, where in homes.items()
        for home in where
        if key == f"{home.rpartition('.')[2]}_{name}"
    ]
    return sorted(found or joined)


def _near_key(key: str, here: list[str], homes: dict[str, frozenset[str]]) -> str | None:
    """A very similar key of the section, else a very similar one that one other section has, else a similar one."""
    if similar := near(key, here, cutoff=0.8):
        return similar
    elsewhere = [name for name, where in homes.items() if len(where) == 1]
    if similar := near(key, elsewhere, cutoff=0.85):
        return f"{next(iter(homes[similar]))}.{similar}".lstrip(".")
    return near(key, here, cutoff=0.7)


def near(text: str, options: list[str], *, cutoff: float) -> str | None:
    """Return the most similar option that may be the same words with a slip in them.

    num_layers is no slip of num_heads, nor warmup_ratio of warmup_steps: who followed that would set another thing.
    """
    similar = difflib.get_close_matches(text, options, n=5, cutoff=cutoff)
    return next((option for option in similar if _may_be_slip(text, option)), None)


def _may_be_slip(text: str, option: str) -> bool:
    words, others = re.split("[_.-]", text), re.split("[_.-]", option)
    if len(words) != len(others):  # a word more or less, or one that is written as two
        return True
    return all(difflib.SequenceMatcher(None, a, b).ratio() >= _SAME_WORD for a, b in zip(words, others, strict=True))


def _any_of(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"one of {', '.join(options)}"


def _name(one: Any) -> str:
    if get_origin(one) is Literal:
        return _any_of(slots.literals(one))
    if get_origin(one) is tuple:
        return f"a list of {len(get_args(one))}"
    if get_origin(one) is list:
        return "a list"
    return _NAMES.get(one, "a mapping")


def _how_to_write(node: Node, annotation: Any) -> str | None:
    value, types, sections = node.value, slots.alternatives(annotation), slots.sections(annotation)
    wants_list = any(get_origin(one) is list for one in types)
    if isinstance(value, str):
        if (number := _as_number(value, types)) is not None:
            return "remove the quotes" if value == number and node.written is None else f"write {number}"
        if slots.accepts_null(annotation) and value.lower() in _NULLS and str not in types:
            return "write null"
        if bool in types and value.lower() in _WORDS_OF_BOOLS:
            return f"write {_WORDS_OF_BOOLS[value.lower()]}"
        if bool in types and value.lower() in ("true", "false"):
            return "remove the quotes"
        if value in slots.all_kinds(annotation):
            return f"write {{kind: {value}}}"
    if isinstance(value, float) and int in types and value.is_integer() and abs(value) < 2**53:
        return f"write {int(value)}"
    if str in types and isinstance(value, bool | int | float):
        in_quotes = f'"{node.written}"'
        # A shell takes one pair of quotes off an override.
        return f"put it in quotes: {in_quotes if node.place.line else shown(in_quotes)}"
    if value is None and sections:
        return "write its keys below it, or remove it"
    if wants_list and isinstance(value, dict):
        return "start the entry with '- '"
    if wants_list and value is not None:
        return f"write [{given(node)}]"
    return None


def _as_number(text: str, types: list[Any]) -> str | None:
    """The number that text was meant to be, where one is expected."""
    bare = text.strip().replace("_", "").replace(",", "")
    try:
        number = resolve(bare)
    except ValueError:
        return None
    fits = float in types if type(number) is float else type(number) is int and (int in types or float in types)
    return bare if fits else None
