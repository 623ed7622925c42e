"""Look up the section, keys and types that a schema expects at a place of a configuration."""

from collections.abc import Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from trainer.config.base import Config
from trainer.config.nodes import Node
from trainer.config.plugins import Pluggable, PluginError, kinds


class Slot(NamedTuple):
    """Schema of one place in a config."""

    annotation: Any
    default: Any = PydanticUndefined


UNKNOWN = Slot(Any)
"""Slot of a place outside the schema."""


def alternatives(annotation: Any) -> list[Any]:
    """Return the types in an annotation, without `Annotated`, unions and null."""
    return [one for one in _types(annotation) if one is not NoneType]


def accepts_null(annotation: Any) -> bool:
    """Return whether null is allowed."""
    return NoneType in _types(annotation)


def _types(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for part in get_args(annotation) for one in _types(part)]
    return [annotation]


def sections(annotation: Any) -> list[type[Config]]:
    """Return the sections in an annotation; several if a `kind` chooses among them."""
    return [one for one in alternatives(annotation) if isinstance(one, type) and issubclass(one, Config)]


def plugins(annotation: Any) -> Pluggable | None:
    """Return the plug-ins that a section accepts besides the built-in kinds."""
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((one for one in metadata if isinstance(one, Pluggable)), None)


def plugin(annotation: Any, kind: object) -> type[Config] | None:
    """Return the section of a plug-in that is accepted here and can be imported."""
    pluggable = plugins(annotation)
    if pluggable is None or not isinstance(kind, str) or not pluggable.has(kind):
        return None
    try:
        return pluggable.section(kind)
    except PluginError:  # reported when the configuration is validated
        return None


def all_kinds(annotation: Any) -> list[str]:
    """Return every value of `kind` that is accepted here, except module:Class."""
    pluggable = plugins(annotation)
    built_in = [kind for section in sections(annotation) for kind in kinds(section)]
    return built_in if pluggable is None else list(dict.fromkeys([*built_in, *pluggable.names()]))


def literals(annotation: Any) -> list[str]:
    """Return the literal values in an annotation."""
    return [str(value) for one in alternatives(annotation) if get_origin(one) is Literal for value in get_args(one)]


def kind_of(node: Node | None, slot: Slot) -> object:
    """Return the kind of a mapping, given or by default; None if neither."""
    given = node.below("kind") if node is not None else None
    return given.value if given is not None else getattr(slot.default, "kind", None)


def section_of(slot: Slot, kind: object) -> type[Config] | None:
    """Return the section of a kind; of a single section, whatever the kind."""
    found = sections(slot.annotation)
    built_in = next((section for section in found if kind in kinds(section)), None)
    section = built_in or plugin(slot.annotation, kind)
    return found[0] if section is None and len(found) == 1 else section


def field(section: type[Config] | None, key: str) -> Slot:
    """Return the slot of a key of a section."""
    info = section.model_fields.get(key) if section is not None else None
    if info is None:
        return UNKNOWN
    annotation: Any = info.annotation
    for pluggable in info.metadata:  # pydantic takes it off the annotation of a field
        if isinstance(pluggable, Pluggable):
            annotation = Annotated[annotation, pluggable]
    return Slot(annotation, info.get_default(call_default_factory=True))


def entry(slot: Slot, index: int) -> Slot:
    """Return the slot of an entry of a list or tuple."""
    for one in alternatives(slot.annotation):
        if get_origin(one) is list or ... in get_args(one):  # of any length
            return Slot(get_args(one)[0])
        if get_origin(one) is tuple and index < len(get_args(one)):
            return Slot(get_args(one)[index])
    return UNKNOWN


def below(slot: Slot, node: Node, part: str | int) -> Slot:
    """Return the slot of a key or index of `node`, whose own slot is `slot`."""
    if isinstance(node.value, list):
        return entry(slot, int(part))
    return named(slot, section_of(slot, kind_of(node, slot)), str(part))


def named(slot: Slot, section: type[Config] | None, key: str) -> Slot:
    """Return the slot of a key: of a section, or of a mapping whose keys are free."""
    free = next((get_args(one)[1] for one in alternatives(slot.annotation) if get_origin(one) is dict), None)
    return field(section, key) if free is None else Slot(free)


def at(root: type[Config], key: str) -> list[Any]:
    """Return the annotations at a dotted key under every kind on the way; empty if there is no such key."""
    found: list[Any] = [root]
    for part in key.split("."):
        options = [one for annotation in found for one in alternatives(annotation)]
        entries = [get_args(one)[0] for one in options if get_origin(one) is list and part.isdecimal()]
        owners = [one for annotation in found for one in sections(annotation) if part in one.model_fields]
        found = entries + [owner.model_fields[part].annotation for owner in owners]
    return found


@cache
def homes(root: type[Config]) -> dict[str, tuple[str, ...]]:
    """Return the dotted sections that have each key of the schema, in schema order."""
    found: dict[str, tuple[str, ...]] = {}
    for where, section in _walk(root, ""):
        for key in section.model_fields:
            found[key] = tuple(dict.fromkeys([*found.get(key, ()), where]))
    return found


def _walk(section: type[Config], where: str) -> Iterator[tuple[str, type[Config]]]:
    yield where, section
    for key, info in section.model_fields.items():
        path = f"{where}.{key}".lstrip(".")
        lists = [one for one in alternatives(info.annotation) if get_origin(one) is list]
        inside = [(f"{path}.0", section) for one in lists for section in sections(get_args(one)[0])]
        for place, inner in [*inside, *((path, section) for section in sections(info.annotation))]:
            yield from _walk(inner, place)
