"""Plug-ins: kinds that are not built in, from a user's own package.

A `kind` of the form `my_package.module:ClassConfig` names a class. Its module is looked up in the working directory, as
with `python -m`, then among the installed packages. An installed package can give its kinds short names with entry
points of the group `turnout.GROUP`. Nothing is imported before a configuration names it.
"""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, SchemaValidator, core_schema

from trainer.config.base import Config

PATH: Final = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
"""Pattern of a plug-in's name: module:Class or module:function."""
_MORE_FOLDERS: ContextVar[tuple[str, ...]] = ContextVar("folders that plug-ins are looked up in", default=())
_EXAMPLE: Final = "my_package.module:ClassConfig"


class PluginError(ValueError):
    """A plug-in that cannot be used; the message follows its name."""


class KindConfig(Config):
    """A section that its `kind` chooses: the base of every built-in and plug-in kind."""

    kind: str = ""
    """Name of the kind; of a plug-in its module:Class or its entry point."""

    @model_validator(mode="before")
    @classmethod
    def _name_plugin(cls, values: Any) -> Any:
        """Set the kind of a plug-in's config made in Python to the name that YAML would use."""
        if isinstance(values, dict) and not values.get("kind") and not cls.model_fields["kind"].default:
            return {**values, "kind": f"{cls.__module__}:{cls.__qualname__}"}
        return values


def kinds(section: type[Config]) -> tuple[str, ...]:
    """Return the values of `kind` that select a section; most sections have one or none."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _core_schema_of(section: type[Config]) -> CoreSchema:
    """Return pydantic's schema of a section, which is built when it is first needed."""
    section.model_rebuild()
    return section.__pydantic_core_schema__


class Pluggable:
    """Annotation of a union of sections that accepts plug-ins as further kinds."""

    def __init__(self, group: str, base: type[KindConfig], lazy: Mapping[str, str] | None = None) -> None:
        """Describe the plug-ins of one section.

        Args:
            group: group of entry points, without `turnout.`.
            base: base class of plug-ins' configs.
            lazy: kinds of this project that are imported on first use, as module:Class by name.
        """
        self.group, self.base = group, base
        self.lazy: Mapping[str, str] = {} if lazy is None else lazy

    def names(self) -> list[str]:
        """Return the short names: lazily imported kinds, and entry points of installed packages."""
        return list(dict.fromkeys([*self.lazy, *_entry_points(self.group)]))

    def has(self, kind: object) -> bool:
        """Return whether a kind is the name of a plug-in, installed or not."""
        return isinstance(kind, str) and (":" in kind or kind in self.lazy or kind in _entry_points(self.group))

    def section(self, kind: str) -> type[KindConfig]:
        """Import the config class of a plug-in.

        Raises:
            PluginError: if there is no such class, or it cannot be used here.
        """
        path = self.lazy.get(kind) or _path_of(kind, self.group)
        found = load_object(path, alike=self.accepts)
        if not self.accepts(found):
            base = f"{self.base.__module__}.{self.base.__name__}"
            raise PluginError(f"{path} is not a config class of turnout.{self.group}; derive it from {base}")
        if (own := kinds(found)) and kind not in own:
            raise PluginError(f"{found.__name__} has a field kind of its own ({own[0]}); remove it from the class")
        if getattr(found, "build", None) is getattr(self.base, "build", None):
            raise PluginError(f"{found.__name__} has no method build; see docs/extending.md")
        return found

    def accepts(self, found: object) -> bool:
        """Return whether an object is a config class for this section."""
        return isinstance(found, type) and issubclass(found, self.base) and found is not self.base

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Wrap the union, whose own kinds are validated as before."""
        built_in = {kind for section in get_args(source) or (source,) for kind in kinds(section)}

        def serialize(value: Any, as_built_in: Callable[[Any], Any]) -> Any:
            return as_built_in(value) if value.kind in built_in else value.model_dump()

        return core_schema.no_info_wrap_validator_function(
            partial(self._validate, built_in=built_in),
            handler(source),
            serialization=core_schema.wrap_serializer_function_ser_schema(serialize),
        )

    def _validate(self, value: Any, as_built_in: Callable[[Any], Any], *, built_in: set[str]) -> Any:
        if isinstance(value, self.base):
            return value
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind in built_in or not self.has(kind):
            return as_built_in(value)
        try:
            section = self.section(kind)
        except PluginError as error:
            raise PydanticCustomError("plugin", "{text}", {"text": str(error)}) from None
        return _validator(section, kind).validate_python(value)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Accept any module:Class, and the keys of installed plug-ins."""
        found = handler(schema)
        options = found.get("oneOf", [found])
        for name in self.names():
            try:
                section = handler(_core_schema_of(self.section(name)))
            except (PluginError, ValidationError):
                continue
            options.append({"allOf": [section], "properties": {"kind": {"const": name}}, "required": ["kind"]})
        plugin = {"type": "object", "properties": {"kind": {"type": "string", "pattern": PATH}}, "required": ["kind"]}
        return {**found, "oneOf": [*options, plugin]} if "oneOf" in found else {"oneOf": [*options, plugin]}


class PluggableFunction:
    """Annotation of a choice of names that also accepts a user's function, module:function."""

    def __init__(self, group: str) -> None:
        """Describe the choice; `group` is its entry points' group, without `turnout.`."""
        self.group = group

    def function(self, name: str) -> Callable[..., Any]:
        """Import the function that a name stands for.

        Raises:
            PluginError: if there is none.
        """
        found = load_object(_path_of(name, self.group), alike=callable)
        if not callable(found):
            raise PluginError(f"{name} is not a function")
        return found

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Wrap the choice, whose own names are validated as before."""

        def validate(value: Any, as_built_in: Callable[[Any], Any]) -> Any:
            is_plugin = isinstance(value, str) and value not in get_args(source)
            if not is_plugin or not (":" in value or value in _entry_points(self.group)):
                return as_built_in(value)
            try:
                self.function(value)
            except PluginError as error:
                raise PydanticCustomError("plugin_function", "{text}", {"text": str(error)}) from None
            return value

        return core_schema.no_info_wrap_validator_function(
            validate, handler(source), serialization=core_schema.to_string_ser_schema()
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Accept any module:function, and installed names."""
        own = handler(schema)
        installed = [{"const": name} for name in _entry_points(self.group)]
        keep = {key: own.pop(key) for key in ("default", "description", "title") if key in own}
        return {"anyOf": [own, *installed, {"type": "string", "pattern": PATH}], **keep}


def load_object(path: str, *, alike: Callable[[object], bool]) -> Any:
    """Import the object that module:name names.

    Args:
        path: module:name.
        alike: returns whether an object of the module may have been intended, for the error message.

    Raises:
        PluginError: if the module cannot be imported or has no such name.
    """
    if not re.fullmatch(PATH, path):
        raise PluginError(f"{path!r} is not of the form module:name; write {_EXAMPLE}")
    module_name, _, name = path.partition(":")
    module = _import(module_name)
    if not hasattr(module, name):
        names = [key for key, value in vars(module).items() if alike(value) and value.__module__ == module.__name__]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none that would do'}"
        raise PluginError(f"module {module_name} has no {name}; {hint}")
    return getattr(module, name)


@contextmanager
def searching(folders: Sequence[Path]) -> Generator[None]:
    """Also look up modules in these folders, after the working directory."""
    token = _MORE_FOLDERS.set(tuple(map(str, folders)))
    try:
        yield
    finally:
        _MORE_FOLDERS.reset(token)


def _import(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    if find_spec(name.partition(".")[0]) is None:
        sys.path.extend(folder for folder in _MORE_FOLDERS.get() if folder not in sys.path)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name.endswith(".py"):
            raise PluginError(f"{name} is a file; write the module, without .py") from None
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise PluginError(f"module {name} imports {error.name}, which is not installed") from None
        raise PluginError(
            f"there is no module {error.name} in {here} or among the installed packages; start turnout in the folder "
            "that has it, or install it"
        ) from None
    except Exception as error:
        raise PluginError(f"module {name} cannot be imported: {type(error).__name__}: {error}") from None


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {entry_point.name: entry_point for entry_point in entry_points(group=f"turnout.{group}")}


def _path_of(name: str, group: str) -> str:
    """Return the module:name of an entry point; any other name is already one."""
    entry_point = _entry_points(group).get(name)
    return name if entry_point is None else entry_point.value


@cache
def _validator(section: type[KindConfig], kind: str) -> SchemaValidator:
    """Return a validator of one section whose errors include the kind, like those of a union of built-in kinds."""
    return SchemaValidator(core_schema.tagged_union_schema({kind: _core_schema_of(section)}, discriminator="kind"))
