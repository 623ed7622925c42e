"""Find the way through a schema: which section, with which keys, is expected at a place of a configuration."""

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
"""A place that the schema does not have."""


def alternatives(annotation: Any) -> list[Any]:
    """Return the types a value may be of, taking `Annotated` and unions apart and leaving null out."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for part in get_args(annotation) for one in alternatives(part)]
    return [] if annotation is NoneType else [annotation]


def accepts_null(annotation: Any) -> bool:
    """True if null is allowed."""
    if get_origin(annotation) is Annotated:
        return accepts_null(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return any(accepts_null(part) for part in get_args(annotation))
    return annotation is NoneType


def sections(annotation: Any) -> list[type[Config]]:
    """Return the sections that may stand here: several where a `kind` chooses."""
    return [one for one in alternatives(annotation) if isinstance(one, type) and issubclass(one, Config)]


def plugins(annotation: Any) -> Pluggable | None:
    """Return the plug-ins that may stand here besides the built-in kinds."""
    if get_origin(annotation) is not Annotated:
        return None
    return next((one for one in get_args(annotation)[1:] if isinstance(one, Pluggable)), None)


def plugin(annotation: Any, kind: object) -> type[Config] | None:
    """Return the section of a plug-in that may stand here and can be imported."""
    pluggable = plugins(annotation)
    if pluggable is None or not isinstance(kind, str) or not pluggable.has(kind):
        return None
    try:
        return pluggable.section(kind)
    except PluginError:  # reported when the configuration is validated
        return None


def all_kinds(annotation: Any) -> list[str]:
    """Return every value of `kind` that may stand here and has a name of its own."""
    pluggable = plugins(annotation)
    built_in = [kind for section in sections(annotation) for kind in kinds(section)]
    return built_in if pluggable is None else list(dict.fromkeys([*built_in, *pluggable.names()]))


def literals(annotation: Any) -> list[str]:
    """Return the fixed values that may stand here."""
    fixed = (get_args(one) for one in alternatives(annotation) if get_origin(one) is Literal)
    return [str(value) for values in fixed for value in values]


def kind_of(node: Node | None, slot: Slot) -> object:
    """Return the kind that a mapping has, given or by default; None if neither."""
    given = node.below("kind") if node is not None else None
    return given.value if given is not None else getattr(slot.default, "kind", None)


def section_of(slot: Slot, kind: object) -> type[Config] | None:
    """Return the section that stands here if its kind is `kind`."""
    found = sections(slot.annotation)
    built_in = next((section for section in found if kind in kinds(section)), None)
    section = built_in or plugin(slot.annotation, kind)
    return found[0] if section is None and len(found) == 1 else section


def field(section: type[Config] | None, key: str) -> Slot:
    """Return what a section expects under a key."""
    info = section.model_fields.get(key) if section is not None else None
    if info is None:
        return UNKNOWN
    annotation: Any = info.annotation
    for pluggable in info.metadata:  # pydantic takes it off the annotation of a field
        if isinstance(pluggable, Pluggable):
            annotation = Annotated[annotation, pluggable]
    return Slot(
        annotation, info.default if info.default_factory is None else info.get_default(call_default_factory=True)
    )


def entry(slot: Slot, index: int) -> Slot:
    """Return what a list or tuple expects at an index."""
    for one in alternatives(slot.annotation):
        if get_origin(one) is list:
            return Slot(get_args(one)[0])
        if get_origin(one) is tuple and index < len(get_args(one)):
            return Slot(get_args(one)[index])
    return UNKNOWN


def below(slot: Slot, node: Node, part: str | int) -> Slot:
    """Return what is expected under a key or an index of `node`, which stands in `slot`."""
    if isinstance(node.value, list):
        return entry(slot, int(part))
    return field(section_of(slot, kind_of(node, slot)), str(part))


def at(root: type[Config], key: str) -> list[Any]:
    """Return what a schema expects at a dotted key, under each kind of the sections on the way; empty: no such key."""
    found: list[Any] = [root]
    for part in key.split("."):
        entries = [
            get_args(one)[0]
            for annotation in found
            for one in alternatives(annotation)
            if get_origin(one) is list and part.isdecimal()
        ]
        owners = [one for annotation in found for one in sections(annotation) if part in one.model_fields]
        found = entries + [owner.model_fields[part].annotation for owner in owners]
    return found


@cache
def homes(root: type[Config]) -> dict[str, tuple[str, ...]]:
    """Return, for each key of the whole schema, the dotted sections that have it, in the order of the schema."""
    found: dict[str, dict[str, None]] = {}  # of ordered sets
    for where, section in _walk(root, ""):
        for key in section.model_fields:
            found.setdefault(key, {})[where] = None
    return {key: tuple(where) for key, where in found.items()}


def _walk(section: type[Config], where: str) -> Iterator[tuple[str, type[Config]]]:
    yield where, section
    for key, info in section.model_fields.items():
        path = f"{where}.{key}".lstrip(".")
        for one in alternatives(info.annotation):
            if get_origin(one) is list:
                for inner in sections(get_args(one)[0]):
                    yield from _walk(inner, f"{path}.0")
        for inner in sections(info.annotation):
            yield from _walk(inner, path)
