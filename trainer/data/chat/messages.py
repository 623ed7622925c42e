"""Turns of a conversation as messages of one shape: OpenAI's, which templates of chats read.

{"role": "user", "content": "Is it raining?"}           OpenAI's turn
{"from": "human", "value": "Is it raining?"}            ShareGPT's
{"role": "assistant", "tool_calls": [...]}              tool_calls.py
{"role": "assistant", "content": "No.", "weight": 0}    read, and not learned (also `train`)
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

from pydantic import Field

from trainer.config.nodes import shown
from trainer.data.chat.tool_calls import parse_calls
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import WRONG_TYPE, type_name
from trainer.data.records.template import check_unicode

Role = Literal["system", "developer", "user", "assistant", "tool"]
Learn = Literal["assistant", "last_turn", "all"] | Annotated[list[Role], Field(min_length=1)]
Truncate = Literal["error", "left", "right", "drop"]
ROLES: Final[tuple[str, ...]] = get_args(Role)
_SHAREGPT: Final = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
"""ShareGPT's own names of roles; it also uses those of OpenAI."""
_FLAGS: Final = ("weight", "train")


class Turn(NamedTuple):
    """A message, and whether its own flag lets it be learned."""

    message: dict[str, Any]
    may_be_learned: bool = True


def parse_turns(value: Any, *, where: str) -> list[Turn]:
    """Return the turns of a list; raise BadRecord for anything else, or a turn that cannot be used."""
    if not isinstance(value, list):
        found = f"{where} is {type_name(value)}; it must be a list of turns"
        raise BadRecord(f"{found}; correct or remove the record", reason=WRONG_TYPE)
    if not value:
        message = f"{where} is empty; a conversation needs a question and an answer; remove the record"
        raise BadRecord(message, reason="without messages")
    return [_parse_turn(turn, where=f"{where}.{number}") for number, turn in enumerate(value)]


def check_order(messages: Sequence[dict[str, Any]], *, where: str) -> None:
    """Raise BadRecord for a tool's result that no call asked for."""
    calls: list[str | None] = []  # ids of the calls that may be answered now
    for number, message in enumerate(messages):
        if message["role"] != "tool":
            calls = [call.get("id") for call in message.get("tool_calls", ())]
            continue
        answered = message.get("tool_call_id")
        if not calls:
            found = "is the result of a tool, and no assistant's turn with tool_calls is before it"
        elif answered is not None and None not in calls and answered not in calls:
            found = f"answers the call {shown(answered)}; the turn before has {', '.join(map(shown, calls))}"
        else:
            continue
        raise BadRecord(
            f"{where}.{number} {found}; every result belongs to a call; correct or remove the record",
            reason="with a tool's result that nothing called",
        )


def check_values(value: Any, *, where: str) -> None:
    """Raise BadRecord for text that is not Unicode, or a number that JSON cannot have, anywhere in a value."""
    if isinstance(value, str):
        check_unicode(value, "text", where=where)
    elif isinstance(value, dict):
        for key, entry in value.items():
            check_unicode(key, "key", where=where)
            check_values(entry, where=f"{where}.{key}")
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            check_values(entry, where=f"{where}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        message = f"{where} is {value}, which JSON does not have; correct or remove the record"
        raise BadRecord(message, reason=WRONG_TYPE)
    elif value is not None and not isinstance(value, bool | int | float):
        message = f"{where} is {type(value).__name__}; JSON has no such values; correct or remove the record"
        raise BadRecord(message, reason=WRONG_TYPE)


def _parse_turn(turn: Any, *, where: str) -> Turn:
    if not isinstance(turn, dict):
        found = f"{where} is {type_name(turn)}; a turn is an object with role and content (or from and value)"
        raise BadRecord(f"{found}; correct or remove the record", reason=WRONG_TYPE)
    check_values(turn, where=where)
    given = {key: value for key, value in turn.items() if value is not None}  # parquet fills missing keys with null
    if ("from" in given or "value" in given) and not ("role" in given or "content" in given):
        given = _from_sharegpt(given, where=where)
    role = given.get("role")
    if role not in ROLES:
        found = f"has the role {shown(role)}" if isinstance(role, str) else "has no role"
        raise BadRecord(
            f"{where} {found}; roles are {', '.join(ROLES)} (ShareGPT's are human, gpt, observation, function_call); "
            "correct or remove the record",
            reason="with an unknown role",
        )
    flags = [_flag(given.pop(name), where=f"{where}.{name}") for name in _FLAGS if name in given]
    if "tool_calls" in given:
        calls = parse_calls(given.pop("tool_calls"), role=role, where=f"{where}.tool_calls")
        given |= {"tool_calls": calls} if calls else {}
    if "content" in given:
        given["content"] = _content(given["content"], where=f"{where}.content")
    elif "tool_calls" not in given:
        found = f"{where} ({role}) has no content"
        raise BadRecord(f"{found}; every turn needs some; correct or remove the record", reason="without content")
    may_be_learned = all(flags)
    is_empty = not str(given.get("content", "")).strip() and not given.get("tool_calls")
    if role == "assistant" and may_be_learned and is_empty and not given.get("reasoning_content"):
        found = f"{where} is an answer without text"
        raise BadRecord(
            f"{found}; it would teach to say nothing; remove it, or take it out of the loss with weight: 0",
            reason="with an empty answer",
        )
    return Turn(given, may_be_learned)


def _from_sharegpt(given: dict[str, Any], *, where: str) -> dict[str, Any]:
    role, value = given.pop("from", None), given.pop("value", None)
    if role == "function_call":
        return {"role": "assistant", "tool_calls": [value], **given}
    is_known = isinstance(role, str)
    return {"role": _SHAREGPT.get(role, role) if is_known else None, "content": value, **given}


def _content(value: Any, *, where: str) -> str:
    """Return the text of a content; parts of text are joined as they are."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        found = f"{where} is {type_name(value)}; it must be a string, or a list of parts of text"
        raise BadRecord(f"{found}; correct or remove the record", reason=WRONG_TYPE)
    texts: list[str] = []
    for number, part in enumerate(value):
        kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else ("text", part)
        if kind != "text":
            found = f"{where}.{number} is a part of type {shown(kind)}"
            raise BadRecord(f"{found}; only text is read; remove the part or the record", reason="with more than text")
        if not isinstance(text, str):
            found = f"{where}.{number} has no text; a part is {{type: text, text: ...}}"
            raise BadRecord(f"{found}; correct or remove the record", reason=WRONG_TYPE)
        texts.append(text)
    return "".join(texts)


def _flag(value: Any, *, where: str) -> bool:
    if value not in (0, 1):
        message = f"{where} is {shown(value)}; it must be 0 or 1 (or false, true); correct or remove the record"
        raise BadRecord(message, reason=WRONG_TYPE)
    return bool(value)
