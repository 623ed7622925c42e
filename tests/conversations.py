"""Forty conversations for chat templates."""

from collections.abc import Sequence
from typing import Any

Messages = list[dict[str, Any]]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers: a < b & 'c' > \"d\", in \u00e9t\u00e9",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},
]
_TEXTS = (
    "Hello",
    "It was a bright cold day in April, and the clocks were striking thirteen.",
    "\u00e9t\u00e9, stra\u00dfe, \u039a\u03c1\u03cc\u03bd\u03bf\u03c2, \u6642\u8a08 \U0001f570\ufe0f\u200d",
    "def day(clock):\n    return clock + 13\n\n\n",
    "  spaces around \t",
    "1234567 + 7654321 = <b>8888888</b> & 'more'",
    "",
    "user\nassistant\nsystem\n### <|x|> [x] </s >",
    "a\r\nb\n\n c",
    "e\u0301 \ufb01 \u200f\u05d0\u05d1 \ufeff",
)
_SYSTEMS = (None, "", "You are terse.", "R\u00e8gles:\n1. \U0001f600\n2. <none>\n")


def conversations() -> list[tuple[Messages, list[dict[str, Any]] | None]]:
    """Return forty conversations with their tools: system or not, one to four turns, calls of tools, Unicode."""
    return [_conversation(number) for number in range(40)]


def _conversation(number: int) -> tuple[Messages, list[dict[str, Any]] | None]:
    messages: Messages = []
    system = _SYSTEMS[number % len(_SYSTEMS)]
    if system is not None:
        messages.append({"role": "system", "content": system})
    has_tools = number % 3 == 2
    for turn in range(1 + number % 4):
        user, answer = (_TEXTS[(number + turn * step) % len(_TEXTS)] for step in (3, 7))
        messages.append({"role": "user", "content": user or "?"})
        if has_tools and turn == number % 2:
            messages += _call(number)
        message = {"role": "assistant", "content": answer}
        if number % 7 == 1:
            message["reasoning_content"] = "\nAn afterthought: " + user
        messages.append(message)
    if number % 5 == 4:
        messages.append({"role": "user", "content": "And then?"})
    return messages, TOOLS if has_tools else None


def _call(number: int) -> Sequence[dict[str, Any]]:
    arguments = {"a": number, "b": [1.5, None, True, {"\u00e9": "<'\">"}]}
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return (
        {"role": "assistant", "content": "", "tool_calls": [call], "name": None},
        {"role": "tool", "content": '{"sum": 3}', "name": "add"},
    )
