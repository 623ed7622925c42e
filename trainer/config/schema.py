"""JSON schema of a configuration, for completion and error marks in editors."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema

from trainer.config.base import Config

_BASE = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
    "description": "Files under this one, relative to it. Mappings merge key by key, the rest replaces.",
}


def json_schema(root: type[Config]) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of the files that `load` accepts for `root`.

    A required key may also come from a base file. Rules between keys are not in the schema.
    """
    schema = _simplified(root.model_json_schema(schema_generator=_WithDocstrings))
    required = schema.pop("required", [])
    alternatives = {"anyOf": [{"required": required}, {"required": ["base"]}]} if required else {}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": root.__name__,
        **alternatives,
        **schema,
        "properties": {"base": _BASE, **schema["properties"]},
    }


def schema_text(root: type[Config]) -> str:
    """Return the schema as JSON text."""
    return json.dumps(json_schema(root), indent=2) + "\n"


class _WithDocstrings(GenerateJsonSchema):
    """Generator that describes each key by the docstring under it.

    pydantic would read these whenever a class is made: a quarter of the time that reading a config takes.
    """

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        """Return the schema of a section."""
        section = super().model_schema(schema)
        parents = [parent for parent in reversed(schema["cls"].__mro__) if issubclass(parent, Config)]
        texts = dict(declared for parent in parents for declared in _declared_keys(parent))
        for key, text in texts.items():
            if text is not None:
                section["properties"][key]["description"] = text
        return section


def _declared_keys(section: type[Config]) -> Iterator[tuple[str, str | None]]:
    """Yield each key that a class declares, and the docstring under it."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    except OSError:  # a plug-in whose source is not at hand
        return
    assert isinstance(definition, ast.ClassDef)
    for statement, after in pairwise([*definition.body, ast.Pass()]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docstring = inspect.cleandoc(text)
                case _:
                    docstring = None
            if statement.target.id in section.model_fields:
                yield statement.target.id, docstring


def _simplified(schema: Any) -> Any:
    """Remove what editors do not use: generated titles, OpenAPI's discriminator, defaults of whole sections.

    The options of a kind are valid without `kind`, which may come from a base or by default, except in list entries,
    which have neither.
    """
    if isinstance(schema, list):
        return [_simplified(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):  # names below, not keywords
            result[key] = {name: _simplified(inner) for name, inner in value.items()}
        elif key == "oneOf":
            result["anyOf"] = _simplified(value)
        elif key == "items" and isinstance(value, dict) and "oneOf" in value:
            result[key] = {"anyOf": [{**option, "required": ["kind"]} for option in value["oneOf"]]}
        elif key not in ("title", "discriminator") and not (key == "default" and _holds_sections(value)):
            result[key] = _simplified(value)
    return result


def _holds_sections(default: Any) -> bool:
    return isinstance(default, dict) or (isinstance(default, list) and any(map(_holds_sections, default)))
