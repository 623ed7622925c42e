"""Rows of published data sets as conversations.

The columns of a row tell its format:

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "tools": [...]}
{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "system": "Be brief."}
{"prompt": "Hi", "completion": "Hello."}                     each text, or a list of turns
{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}      a pair, of which the chosen side is read
{"instruction": "Greet", "input": "Ann", "output": "Hello, Ann.", "history": [["Hi", "Hello."]]}
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from trainer.data.chat.messages import Turn, check_order, check_values, parse_turns
from trainer.data.chat.tool_calls import parse_tools
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import WRONG_TYPE, Record, type_name
from trainer.data.records.template import check_unicode

ChatFormat = Literal["messages", "prompt_completion", "preference", "alpaca"]
_TURNS: Final = ("messages", "conversations", "conversation")
_COLUMNS: Final[dict[ChatFormat, tuple[str, ...]]] = {
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "alpaca": ("instruction", "output"),
}
_REMEDY: Final = "correct or remove the record"
_WITHOUT: Final = "without a conversation"


@dataclass(frozen=True)  # no slots: the text is cached
class ChatRow:
    """A conversation."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    not_learned: frozenset[int] = frozenset()
    """Indices of messages that are read and never learned: by their own flag, or as part of a prompt."""

    @cached_property
    def text(self) -> str:
        """JSON of what is said; equal for equal conversations in any format."""
        return json.dumps([self.messages, self.tools], ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def parse_chat(record: Record, *, format: ChatFormat | None = None, turns_key: str | None = None) -> ChatRow:
    """Return the conversation of a record; raise BadRecord if it has none, or it is malformed.

    Without `format`, the columns decide. `turns_key` names the column of the turns, where it has another name than
    usual.
    """
    try:
        return _parse(record, format, turns_key)
    except RecursionError:
        message = f"{record.where}: is nested too deeply; {_REMEDY}"
        raise BadRecord(message, reason=WRONG_TYPE) from None


def _parse(record: Record, format: ChatFormat | None, turns_key: str | None) -> ChatRow:
    given = {key: value for key, value in record.values.items() if value is not None}
    chosen = _only_format(record, given, turns_key) if format is None else format
    if chosen == "messages":
        column = turns_key or _turns_column(record, given)
        turns = parse_turns(record.value(column), where=f"{record.where}: {column}")
    elif chosen == "alpaca":
        column, turns = "turn", _alpaca(record, given)
    else:
        column = "completion" if chosen == "prompt_completion" else "chosen"
        turns = _prompted(record, given, column)
    check_order([turn.message for turn in turns], where=f"{record.where}: {column}")
    turns = _with_system(record, given, turns)
    tools = None
    if "tools" in given:
        check_values(given["tools"], where=f"{record.where}: tools")
        tools = parse_tools(given["tools"], where=f"{record.where}: tools")
    not_learned = frozenset(number for number, turn in enumerate(turns) if not turn.may_be_learned)
    return ChatRow(tuple(turn.message for turn in turns), tools, not_learned)


def _only_format(record: Record, given: dict[str, Any], turns_key: str | None) -> ChatFormat:
    """Return the format that the columns of a record tell."""
    found: list[ChatFormat] = ["messages"] if turns_key is not None or any(name in given for name in _TURNS) else []
    found += [name for name, columns in _COLUMNS.items() if all(column in given for column in columns)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise _no_conversation(record, given)
    columns = " and ".join("/".join(_COLUMNS.get(name, ("messages",))) for name in found)
    message = f"{record.where}: has {columns}, which are {len(found)} formats; set `format` to the one to read"
    raise BadRecord(message, reason="of two formats")


def _turns_column(record: Record, given: dict[str, Any]) -> str:
    found = [name for name in _TURNS if name in given]
    if not found:
        raise _no_conversation(record, given)
    if len(found) > 1:
        message = f"{record.where}: has both {found[0]} and {found[1]}; set `turns_key` to the one to read"
        raise BadRecord(message, reason="of two formats")
    return found[0]


def _alpaca(record: Record, given: dict[str, Any]) -> list[Turn]:
    if "instruction" not in given or "output" not in given:
        raise _no_conversation(record, given)
    history = given.get("history", [])
    if not isinstance(history, list):
        message = f"{record.where}: history is {type_name(history)}; it must be a list of pairs of strings; {_REMEDY}"
        raise BadRecord(message, reason=WRONG_TYPE)
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            message = f"{record.where}: history.{number} is not a pair of strings; {_REMEDY}"
            raise BadRecord(message, reason=WRONG_TYPE)
        turns += _exchange(*pair)
    asked = "\n".join(text for text in (_text(record, given, name) for name in ("instruction", "input")) if text)
    turns += _exchange(asked, _text(record, given, "output"))
    return parse_turns(turns, where=f"{record.where}: turn")


def _prompted(record: Record, given: dict[str, Any], column: str) -> list[Turn]:
    """Return the turns of a prompt, which are not learned, and those of its completion."""
    if column not in given:
        raise _no_conversation(record, given)
    answer = _turns_of(record, given[column], column, role="assistant")
    if "prompt" not in given:
        if answer[0].message["role"] == "assistant":
            message = f"{record.where}: {column} begins with an answer, and there is no prompt; {_REMEDY}"
            raise BadRecord(message, reason=_WITHOUT)
        return answer
    prompt = _turns_of(record, given["prompt"], "prompt", role="user")
    if answer[0].message["role"] in ("system", "developer", "user"):  # it repeats the prompt
        same = [turn.message for turn in answer[: len(prompt)]]
        if same != [turn.message for turn in prompt]:
            message = f"{record.where}: {column} begins with a question that is not the prompt; {_REMEDY}"
            raise BadRecord(message, reason="with two prompts")
        answer = answer[len(prompt) :]
    return [*(Turn(turn.message, may_be_learned=False) for turn in prompt), *answer]


def _turns_of(record: Record, value: Any, column: str, *, role: str) -> list[Turn]:
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    return parse_turns(turns, where=f"{record.where}: {column}")


def _with_system(record: Record, given: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    """Return the turns after the system prompt in a column of its own."""
    system = _text(record, given, "system")
    if not system:
        return turns
    if turns[0].message["role"] == "system":
        message = f"{record.where}: has a column system and a turn of system; a conversation has one; {_REMEDY}"
        raise BadRecord(message, reason="with two system prompts")
    return [Turn({"role": "system", "content": system}), *turns]


def _text(record: Record, given: dict[str, Any], column: str) -> str:
    if column not in given:
        return ""
    return check_unicode(record.text(column), column, where=record.where)


def _exchange(asked: str, answered: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _no_conversation(record: Record, given: dict[str, Any]) -> BadRecord:
    found = ", ".join(list(given)[:8]) or "no columns"
    return BadRecord(
        f"{record.where}: has no conversation, but {found}; it needs messages or conversations, prompt and completion, "
        "chosen and rejected, or instruction and output; correct the record, or set turns_key",
        reason=_WITHOUT,
    )
