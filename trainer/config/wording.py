"""Word the messages about keys and values, with suggestions for misspelled ones."""

import difflib
import re
from typing import Any, Literal, get_args, get_origin

from trainer.config import foreign, slots
from trainer.config.base import LINE_PATTERN, PATH_PATTERN, Config
from trainer.config.hints import given, how_to_write, meant_value
from trainer.config.nodes import Node, shown

_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_MAX_ELSEWHERE = 3
_MIN_WORD_RATIO = 0.6
"""Least similarity of a word and its misspelling."""
_MIN_NAME_RATIO = 0.9
"""Least similarity of a name and its misspelling with another number of words."""
_UNITS = frozenset({"num", "n", "size", "steps", "step", "coef", "coeff", "rate", "factor", "value", "of", "the"})
"""Words that a key may have or lack without meaning something else."""
_NAME_PATTERN = re.compile(r"\^\[A-Za-z0-9\]\[A-Za-z0-9\._-\]\{0,(\d+)\}\$")


def choice(value: object, options: list[str]) -> str:
    """Return the message for a value that is none of `options`."""
    meant = meant_value(value, options)
    if len(options) == 1:
        return f"must be {options[0]}, got {shown(value)}" + (f", which is {meant} here" if meant else "")
    text = "null" if value is None else str(value).lower()
    hint = ""
    if text in foreign.NO_HALF and "bfloat16" in options:
        hint = "; there is no float16: use bfloat16"
    elif (similar := meant or near(text, options, cutoff=0.6)) is not None:
        besides = f" with {': '.join(foreign.ALSO_NEEDED[text])}" if meant and text in foreign.ALSO_NEEDED else ""
        hint = f"; did you mean {similar}{besides}?"
    return f"{shown(value)} is not one of {', '.join(options)}{hint}"


def unknown_key(
    key: str,
    section: type[Config],
    siblings: list[type[Config]],
    root: type[Config],
    *,
    where: str = "",
    node: Node | None = None,
) -> str:
    """Return the message for an unknown key of `section`, with a suggestion.

    Args:
        key: the key.
        section: the section that contains it.
        siblings: sections that a `kind` chooses from, `section` among them.
        root: the whole schema.
        where: dotted key of the section.
        node: value of the key; None: any value.
    """
    options = list(section.model_fields)
    owners = [kind for other in siblings if key in other.model_fields for kind in slots.kinds(other)]
    if owners:
        kind = section.model_fields["kind"].default or section.__name__
        return f"unknown key for kind: {kind}; it is an option of kind: {' or '.join(owners)}"
    if key == "base":
        return "unknown key; base belongs to the top level"
    homes = slots.homes(root)
    first, _, last = key.rpartition(".")
    if last in homes and all(part in homes for part in first.split(".")):
        nested = "".join(f"{part}: {{" for part in first.split("."))
        return f"unknown key; dots are for overrides: write {nested}{last}: ...{'}' * (first.count('.') + 1)}"
    if (meant := foreign.counterpart(key, where)) is not None and (not meant.key or slots.at(root, meant.key)):
        return f"unknown key; {meant}"
    if similar := next(
        (name for name in _keys(section, node) if name.removesuffix("s") == key.removesuffix("s")), None
    ):
        return f"unknown key; did you mean {similar}?"
    elsewhere = _elsewhere(key, homes)
    if key in elsewhere:  # also where a section has a seed of its own
        return f"unknown key; {key} belongs to the top level"
    if 0 < len(elsewhere) <= _MAX_ELSEWHERE:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    if similar := _near_key(key, section, root, node):
        return f"unknown key; did you mean {similar}?"
    if options == ["kind"] and not slots.kinds(section):
        return "unknown key; this plug-in has no options"
    return f"unknown key; use {_any_of(options)}"


def _expected(annotation: Any) -> str:
    names = [_name(one) for one in slots.alternatives(annotation)]
    return " or ".join(dict.fromkeys([*names, "null"] if slots.accepts_null(annotation) else names))


def wrong_type(node: Node, annotation: Any) -> str:
    """Return the message for a value of the wrong type, with how to write it."""
    hint = how_to_write(node, annotation)
    return f"expected {_expected(annotation)}, got {given(node)}" + (f"; {hint}" if hint else "")


def wrong_length(node: Node, annotation: Any) -> str:
    """Return the message for a list of the wrong length."""
    return f"expected {_expected(annotation)}, got a list of {len(node.value)}"


def pattern(value: str, expression: str) -> str:
    """Return the message for text that does not match its pattern."""
    if match := _NAME_PATTERN.fullmatch(expression):
        allowed = f"at most {int(match[1]) + 1} letters, digits, '.', '_' and '-', starting with a letter or a digit"
        return f"{shown(value)} is not a name; use {allowed}"
    if expression == PATH_PATTERN:
        return f"{shown(value)} is not a path; use at most 1000 characters, none of them a control character"
    if expression == LINE_PATTERN:
        return f"{shown(value)} has a line break or another control character; write it in one line"
    return f"{shown(value)} does not have the form {expression}"


def _elsewhere(key: str, homes: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the dotted keys whose last part, or last two parts joined (eval_every), are this name."""
    found = [f"{home}.{key}".lstrip(".") for home in homes.get(key, ())]
    pairs = [(home, name) for name, where in homes.items() for home in where]
    return found or [f"{home}.{name}" for home, name in pairs if key == f"{home.rpartition('.')[2]}_{name}"]


def _near_key(key: str, section: type[Config], root: type[Config], node: Node | None) -> str | None:
    """Return a very similar key of the section, else one of a single other section, else a similar key."""
    here = _keys(section, node)
    if similar := near(key, here, cutoff=0.8):
        return similar
    only = {name: f"{where[0]}.{name}".lstrip(".") for name, where in slots.homes(root).items() if len(where) == 1}
    elsewhere = [name for name, dotted in only.items() if _may_be_under(node, slots.at(root, dotted))]
    if similar := near(key, elsewhere, cutoff=0.85):
        return only[similar]
    return near(key, here, cutoff=0.7)


def _keys(section: type[Config], node: Node | None) -> list[str]:
    """Return the keys of a section that a value may be intended for."""
    return [name for name, field in section.model_fields.items() if _may_be_under(node, [field.annotation])]


def _may_be_under(node: Node | None, annotations: list[Any]) -> bool:
    """Return whether a value may be intended for a key: `streaming: true` cannot be a misspelled `train: {...}`."""
    if node is None or node.value is None:
        return True
    return any(_may_have_type(node, annotation) for annotation in annotations)


def _may_have_type(node: Node, annotation: Any) -> bool:
    types = slots.alternatives(annotation)
    lists = [one for one in types if get_origin(one) in (list, tuple)]
    if isinstance(node.value, dict):
        return any(map(slots.sections, [annotation, *(get_args(one)[0] for one in lists)]))
    if isinstance(node.value, list):
        return bool(lists)
    return len(types) > len(lists) + len(slots.sections(annotation)) or how_to_write(node, annotation) is not None


def near(text: str, options: list[str], *, cutoff: float) -> str | None:
    """Return the most similar option that may be the same words misspelled.

    num_layers is not a misspelling of num_heads, nor warmup_ratio of warmup_steps: they would set something else.
    """
    similar = difflib.get_close_matches(text, options, n=5, cutoff=cutoff)
    return next((option for option in similar if _may_be_misspelled(text, option)), None)


def _may_be_misspelled(text: str, option: str) -> bool:
    words, others = re.split("[_.-]", text), re.split("[_.-]", option)
    if len(words) != len(others):  # one word written as two, or another word that changes the meaning
        as_one = difflib.SequenceMatcher(None, "".join(words), "".join(others)).ratio()
        return as_one >= _MIN_NAME_RATIO or set(words) ^ set(others) <= _UNITS
    return all(
        difflib.SequenceMatcher(None, a, b).ratio() >= _MIN_WORD_RATIO for a, b in zip(words, others, strict=True)
    )


def _any_of(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"one of {', '.join(options)}"


def _name(one: Any) -> str:
    if get_origin(one) is Literal:
        return _any_of(slots.literals(one))
    if get_origin(one) is tuple and ... not in get_args(one):
        return f"a list of {len(get_args(one))}"
    if get_origin(one) in (list, tuple):
        return "a list"
    return _TYPE_NAMES.get(one, "a mapping")
