"""List every leaf key of a schema, each with a minimal configuration that contains it."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from trainer.config import slots
from trainer.config.base import Config

Step = tuple[str, type[Config], bool]
"""Key, section below it, and whether the section is an entry of a list."""


class Leaf(NamedTuple):
    """A key whose value is not a section."""

    path: tuple[Step, ...]
    section: type[Config]
    key: str
    annotation: Any

    @property
    def name(self) -> str:
        """Dotted name, with the kinds of sections that have several."""
        parts = [f"{key}{'.0' if listed else ''}{_kind_of(section)}" for key, section, listed in self.path]
        return ".".join([*parts, self.key])

    @property
    def names(self) -> list[str]:
        """Names that may appear in a message about its value: its own and those of the enclosing sections."""
        return [self.key, *(key for key, _, _ in self.path)]

    def accepts(self, *kinds: type) -> bool:
        """Return whether its value, or an entry of it, may have one of these types."""
        return any(kind in kinds for kind in _inside(self.annotation))

    @property
    def is_list(self) -> bool:
        """Whether its values are lists."""
        return any(get_origin(one) in (list, tuple) for one in slots.alternatives(self.annotation))

    @property
    def limits(self) -> list[int | float]:
        """Bounds of its range, if any."""
        field = self.section.model_fields[self.key]
        found = [getattr(data, name, None) for data in _metadata(field) for name in ("ge", "gt", "le", "lt")]
        return [limit for limit in found if limit is not None]

    def document(self, value: Any, root: dict[str, Any]) -> dict[str, Any]:
        """Return a configuration with this value."""
        document = dict(root)
        node = document
        for key, section, listed in self.path:
            below = _required(section)
            node[key] = [below] if listed else below
            node = below
        node[self.key] = value
        return document


def leaves(section: type[Config], path: tuple[Step, ...] = (), seen: set[Any] | None = None) -> Iterator[Leaf]:
    """Yield all leaves; those of a section used in several places once."""
    seen = set() if seen is None else seen
    if section in seen:
        return
    seen.add(section)
    for key, field in section.model_fields.items():
        if key == "kind":
            continue
        is_leaf = False
        for one in slots.alternatives(field.annotation):
            is_list = get_origin(one) is list and bool(slots.sections(get_args(one)[0]))
            below = slots.sections(get_args(one)[0] if is_list else one)
            for inner in below:
                yield from leaves(inner, (*path, (key, inner, is_list)), seen)
            is_leaf = is_leaf or not below
        if is_leaf:
            yield Leaf(path, section, key, field.annotation)


def _required(section: type[Config]) -> dict[str, Any]:
    """Return a minimal section of its kind."""
    values: dict[str, Any] = {"kind": kinds[0]} if (kinds := slots.kinds(section)) else {}
    for key, field in section.model_fields.items():
        if field.is_required() and key != "kind":
            one = slots.alternatives(field.annotation)[0]
            is_section = isinstance(one, type) and issubclass(one, Config)
            values[key] = _required(one) if is_section else ["x", "y"] if get_origin(one) is list else "x"
    return values | _BESIDE.get(values.get("kind"), {})


_BESIDE: dict[Any, dict[str, Any]] = {
    "choice": {"choices": ["x", "y"]},
    "ranking": {"candidates_column": "x"},
    "jsonl": {"path": "x"},
    "mixture_of_depths": {},
}
"""Keys of which a rule requires one."""


def _kind_of(section: type[Config]) -> str:
    return f"({kinds[0]})" if (kinds := slots.kinds(section)) else ""


def _inside(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (None, types.NoneType):
        yield annotation
    for part in get_args(annotation):
        if get_origin(annotation) is not Annotated or part is get_args(annotation)[0]:
            yield from _inside(part)


def _metadata(field: Any) -> Iterator[Any]:
    """Yield the constraints on the values of a field or of its entries."""
    yield from field.metadata
    pending = [field.annotation]
    while pending:
        annotation = pending.pop()
        if get_origin(annotation) is Annotated:
            for data in get_args(annotation)[1:]:
                yield data
                yield from getattr(data, "metadata", ())
            pending.append(get_args(annotation)[0])
        else:
            pending += get_args(annotation)
