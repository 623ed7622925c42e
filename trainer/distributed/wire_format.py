"""Encode objects that ranks send each other as JSON, so that received data is never executed. Imports no torch.

Pickle, which torch's own `all_gather_object` uses, executes code of any stranger who has found the port.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from trainer.errors import TurnoutError

Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"
"""Values that `to_json` accepts. As a type it lets the checker find values that would fail on one rank alone."""


def to_json(value: Plain) -> bytes:
    """Encode None, bool, int, float, str, sequences of these or mappings from str to these.

    Floats are restored bit for bit, including NaN and Inf; tuples become lists.

    Raises:
        TypeError: for any other value.
    """
    _check(value)
    return json.dumps(value, separators=(",", ":")).encode()


def from_json(data: bytes) -> Any:
    """Decode the result of `to_json`."""
    return json.loads(data)


def error_to_wire(error: TurnoutError | None) -> list[str] | None:
    """Encode an error as its class name and message."""
    return None if error is None else [type(error).__name__, str(error)]


def error_from_wire(value: Sequence[str] | None) -> TurnoutError | None:
    """Decode the result of `error_to_wire`; a TurnoutError if the class is unknown."""
    if value is None:
        return None
    name, message = value
    return next((kind for kind in _kinds(TurnoutError) if kind.__name__ == name), TurnoutError)(message)


def _kinds(kind: type[TurnoutError]) -> list[type[TurnoutError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _kinds(child))]


def _check(value: Any) -> None:
    if value is None or isinstance(value, bool | int | float | str):
        return
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is a key of a mapping and not a str: JSON would convert it")
        value = list(value.values())
    elif not isinstance(value, list | tuple):
        raise TypeError(f"{type(value).__name__} cannot be sent: ranks send each other tensors and JSON only")
    for part in value:
        _check(part)
