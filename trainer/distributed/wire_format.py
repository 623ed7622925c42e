"""Plain values on their way between ranks: as JSON, so that whatever arrives is read and nothing of it is executed.

Pickle, which torch's own `all_gather_object` uses, runs what a stranger sends who has found the port. Imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from trainer.errors import TurnoutError

Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"
"""Values that `to_json` takes. Signatures name it, so that the type checker finds what would stop one rank alone."""


def to_json(value: Plain) -> bytes:
    """Return a plain value as text: None, bool, int, float, str, sequences of these, mappings from str to these.

    Floats come back bit for bit, what is not finite included; tuples come back as lists.

    Raises:
        TypeError: if the value is something else.
    """
    _check(value)
    return json.dumps(value, separators=(",", ":")).encode()


def from_json(data: bytes) -> Any:
    """Return the value that `to_json` was given.

    Raises:
        ValueError: if it is no such text.
    """
    return json.loads(data)


def error_to_wire(error: TurnoutError | None) -> list[str] | None:
    """Return an error's kind and message."""
    return None if error is None else [type(error).__name__, str(error)]


def error_from_wire(value: Sequence[str] | None) -> TurnoutError | None:
    """Return the error that `error_to_wire` was given; of a kind that is not ours, a TurnoutError."""
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
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"{wrong[0]!r} is the key of a mapping and no text: JSON would make one of it")
        parts: Sequence[Any] = list(value.values())
    elif isinstance(value, list | tuple):
        parts = value
    else:
        raise TypeError(f"{type(value).__name__} is no plain value: ranks send each other tensors and JSON only")
    for part in parts:
        _check(part)
