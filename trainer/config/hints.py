"""Suggest how to write a value of the wrong type; the schema accepts every suggestion."""

import re
from typing import Any, Final, get_origin

from pydantic import TypeAdapter, ValidationError

from trainer.config import foreign, slots
from trainer.config.base import Config
from trainer.config.nodes import MAX_SHOWN, Node, shown
from trainer.config.slots import Slot
from trainer.config.yaml_nodes import resolve

_BOOL_WORDS: Final = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_NULL_WORDS: Final = frozenset({"none", "never", "off", "no", "nil", "disabled"})
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./~][\w./~*+-]*", re.ASCII)
"""Text that needs no quotes inside braces."""


def meant_value(value: object, options: list[str]) -> str | None:
    """Return the option that a value stands for, ignoring case and including other trainers' names."""
    text = "null" if value is None else str(value).lower()
    meant = text if text in options else foreign.values().get(text)
    return meant if meant in options else None


def how_to_write(node: Node, annotation: Any) -> str | None:
    """Return how to write a value as the expected type; None if there is no hint."""
    value, types = node.value, slots.alternatives(annotation)
    if isinstance(value, str):
        if (number := _as_number(value, types)) is not None and accepts(annotation, _read(number)):
            return "remove the quotes" if value == number and node.written is None else f"write {number}"
        if slots.accepts_null(annotation) and value.lower() in _NULL_WORDS and str not in types:
            return "write null"
        if bool in types and value.lower() in _BOOL_WORDS:
            return f"write {_BOOL_WORDS[value.lower()]}"
        if bool in types and value.lower() in ("true", "false"):
            return "remove the quotes" if node.written is None else f"write {value.lower()}"
    if isinstance(value, float) and int in types and value.is_integer() and accepts(annotation, int(value)):
        return f"write {int(value)}"
    if str in types and isinstance(value, bool | int | float):
        in_quotes = f'"{node.written}"'
        # The shell removes one pair of quotes from an override.
        return f"put it in quotes: {in_quotes if node.place.line else shown(in_quotes)}"
    if value is None:
        return "write its keys below it, or remove it" if slots.sections(annotation) else None
    if isinstance(value, dict) and slots.sections(slots.entry(Slot(annotation), 0).annotation):
        is_block = node.place.line > node.key_place.line
        return "start the entry with '- '" if is_block else "put it in brackets: [{...}]"
    if isinstance(value, dict | list):
        return None
    written = _as_section(value, annotation) or _as_list(node, annotation)
    return None if written is None else f"write {written}"


def given(node: Node) -> str:
    """Return a value as it was written."""
    return shown(node.written)[1:-1] if node.written and not isinstance(node.value, str) else shown(node.value)


def accepts(annotation: Any, value: Any) -> bool:
    """Return whether a plain value is valid for a type, including rules between keys."""
    # A section has its own strictness, and YAML has lists where a tuple is expected.
    is_lax = slots.sections(annotation) or any(get_origin(one) is tuple for one in slots.alternatives(annotation))
    try:
        TypeAdapter(annotation).validate_python(value, strict=None if is_lax else True)
    except ValidationError:
        return False
    return True


def _as_list(node: Node, annotation: Any) -> str | None:
    """Write a single value, or text with commas, as a list."""
    if not any(get_origin(one) in (list, tuple) for one in slots.alternatives(annotation)):
        return None
    entry = slots.entry(Slot(annotation), 0).annotation
    if (section := _as_section(node.value, entry)) is not None:
        return f"[{section}]"
    parts = [part.strip() for part in node.value.split(",")] if isinstance(node.value, str) else []
    if len(parts) > 1 and accepts(annotation, [_read(part) for part in parts]):
        return f"[{', '.join(part if not isinstance(_read(part), str) else _flow(part) for part in parts)}]"
    if accepts(annotation, [node.value]):
        return f"[{given(node)}]"
    if len(parts) == 1 and accepts(annotation, [_read(parts[0])]):
        return f"[{parts[0]}]"
    return None


def _read(text: str) -> Any:
    """Return the YAML value of text; a number that does not fit stays text."""
    try:
        return resolve(text)
    except ValueError:
        return text


def _as_section(value: object, annotation: Any) -> str | None:
    """Write the mapping that a single value stands for: a kind, the option of a single key, or a file."""
    sections = slots.sections(annotation)
    text = str(value).lower() if isinstance(value, bool) else value
    if not sections or not isinstance(text, str):
        return None
    if (kind := meant_value(text, slots.all_kinds(annotation))) is not None:
        section = next(one for one in sections if kind in slots.kinds(one))
        also = foreign.ALSO_NEEDED.get(text.lower())
        besides = [": ".join(also)] if also is not None and also[0] in section.model_fields else []
        required = _required(section)
        if required and not accepts(section, {"kind": kind, **dict.fromkeys(required, "...")}):  # not only texts
            return f"its keys: {', '.join(['kind', *required])}"
        return f"{{{', '.join([f'kind: {kind}', *besides, *(f'{name}: ...' for name in required)])}}}"
    if slots.plugin(annotation, text) is not None:
        return f"{{kind: {_flow(text)}}}"
    if len(sections) == 1 and (option := _option_of_one_key(text, sections[0])) is not None:
        return f"{{{option}}}"
    return _as_file(text, annotation) if value is text else None


def _option_of_one_key(text: str, section: type[Config]) -> str | None:
    """Return `key: value` if exactly one key of a section has the value among its options."""
    options = {
        name: meant_value(text, slots.literals(field.annotation)) for name, field in section.model_fields.items()
    }
    found = [f"{name}: {option}" for name, option in options.items() if option is not None]
    return found[0] if len(found) == 1 else None


def _as_file(text: str, annotation: Any) -> str | None:
    """Write the mapping that reads a file, by its suffix; else the first section that requires a single text."""
    suffix = text.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2].lower()
    candidates = [foreign.OF_SUFFIX[suffix]] if suffix in foreign.OF_SUFFIX else []
    candidates += [
        "".join(f"kind: {kind}, " for kind in slots.kinds(section)[:1]) + f"{required[0]}: "
        for section in slots.sections(annotation)
        if len(required := _required(section)) == 1
    ]
    for start in candidates:
        pairs = dict(pair.split(": ") for pair in f"{start}{{}}".split(", "))
        if accepts(annotation, {key: text if given == "{}" else given for key, given in pairs.items()}):
            return f"{{{start}{_flow(text)}}}"
    return None


def _required(section: type[Config]) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required()]


def _flow(text: str) -> str:
    """Write text inside braces or brackets."""
    if len(text) > MAX_SHOWN:
        return "..."
    return text if _PLAIN.fullmatch(text) and isinstance(_read(text), str) else shown(text)


def _as_number(text: str, types: list[Any]) -> str | None:
    """Return the number that text stands for, if a number is expected."""
    bare = text.strip().replace("_", "").replace(",", "")
    number = _read(bare)
    fits = float in types if type(number) is float else type(number) is int and (int in types or float in types)
    return bare if fits else None
