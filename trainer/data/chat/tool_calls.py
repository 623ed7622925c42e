"""Tools that a conversation offers, and the calls of them, as OpenAI writes both.

{"type": "function", "function": {"name": "rain", "parameters": {...}}}                    a tool
{"id": "c1", "type": "function", "function": {"name": "rain", "arguments": {...}}}         a call

`function` may be left out (its keys are then the object's own), and JSON may be given as text.
"""

import json
from typing import Any, Final

from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import type_name

_REMEDY: Final = "correct or remove the record"
BAD_CALL: Final = "with a malformed tool call"
"""`BadRecord.reason` of a call."""
_BAD_TOOLS: Final = "with malformed tools"


def parse_calls(value: Any, *, role: str, where: str) -> list[dict[str, Any]]:
    """Return the calls of a turn, with their arguments as objects; raise BadRecord if one is malformed."""
    if not isinstance(value, list):
        raise BadRecord(f"{where} is {type_name(value)}; it must be a list of calls; {_REMEDY}", reason=BAD_CALL)
    if value and role != "assistant":
        raise BadRecord(f"{where} is in a turn of {role}; only the assistant calls; {_REMEDY}", reason=BAD_CALL)
    return [_parse_call(call, where=f"{where}.{number}") for number, call in enumerate(value)]


def parse_tools(value: Any, *, where: str) -> tuple[dict[str, Any], ...] | None:
    """Return the tools of a conversation, None if there are none; raise BadRecord if one is malformed."""
    tools = _from_json(value, where=where, reason=_BAD_TOOLS)
    if not isinstance(tools, list):
        raise BadRecord(f"{where} is {type_name(tools)}; it must be a list of tools; {_REMEDY}", reason=_BAD_TOOLS)
    return tuple(_parse_tool(tool, where=f"{where}.{number}") for number, tool in enumerate(tools)) or None


def _parse_call(value: Any, *, where: str) -> dict[str, Any]:
    call = _from_json(value, where=where, reason=BAD_CALL)
    function, rest = _function(call, where=where, reason=BAD_CALL)
    arguments = _from_json(function.get("arguments", {}), where=f"{where}: arguments", reason=BAD_CALL)
    if not isinstance(arguments, dict):
        found = f"{where}: arguments is {type_name(arguments)}; it must be an object, or JSON text of one"
        raise BadRecord(f"{found}; {_REMEDY}", reason=BAD_CALL)
    return rest | {"type": "function", "function": function | {"arguments": arguments}}


def _parse_tool(value: Any, *, where: str) -> dict[str, Any]:
    tool = _from_json(value, where=where, reason=_BAD_TOOLS)
    function, rest = _function(tool, where=where, reason=_BAD_TOOLS)
    parameters = function.get("parameters", {})
    if not isinstance(parameters, dict):
        found = f"{where}: parameters is {type_name(parameters)}; it must be an object"
        raise BadRecord(f"{found}; {_REMEDY}", reason=_BAD_TOOLS)
    return rest | {"type": "function", "function": function}


def _function(value: Any, *, where: str, reason: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a function with its name, and the keys beside it."""
    if not isinstance(value, dict):
        raise BadRecord(f"{where} is {type_name(value)}; it must be an object; {_REMEDY}", reason=reason)
    given = {key: entry for key, entry in value.items() if entry is not None}
    if "function" in given:
        rest = {key: entry for key, entry in given.items() if key != "function"}
        given = given["function"]
        if not isinstance(given, dict):
            raise BadRecord(f"{where}: function is {type_name(given)}; it must be an object; {_REMEDY}", reason=reason)
        given = {key: entry for key, entry in given.items() if entry is not None}
    else:
        rest = {key: given.pop(key) for key in ("id", "type") if key in given}
    if not isinstance(given.get("name"), str) or not given["name"]:
        raise BadRecord(f"{where} has no name; every function has one; {_REMEDY}", reason=reason)
    return given, rest


def _from_json(value: Any, *, where: str, reason: str) -> Any:
    """Return the value of JSON text; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where} is not JSON ({error}); {_REMEDY}", reason=reason) from None
