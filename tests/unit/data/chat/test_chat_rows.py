"""Every published format becomes the same conversation."""

import json
from typing import Any

import pytest

from trainer.data.chat.chat_rows import ChatRow, parse_chat
from trainer.data.records.base import Record

ASK, ANSWER = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
RAIN = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": {"in": "Rome"}}}
RESULT = {"role": "tool", "content": "dry", "tool_call_id": "c1"}


def parsed(values: dict[str, Any], **options: Any) -> ChatRow:
    return parse_chat(Record("a.jsonl:1", values), **options)


SAME = {
    "OpenAI": {"messages": [SYSTEM, ASK, ANSWER]},
    "OpenAI with parts and nulls": {
        "messages": [
            SYSTEM | {"name": None, "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]},
            ANSWER | {"tool_calls": []},
        ],
        "tools": None,
        "prompt": None,
    },
    "a system prompt in a column": {"messages": [ASK, ANSWER], "system": "Be brief.", "tools": []},
    "OpenAI's turns in conversations": {"conversations": [SYSTEM, ASK, ANSWER], "id": 3},
    "ShareGPT": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Rain?"},
            {"from": "gpt", "value": "No."},
        ]
    },
    "alpaca": {"instruction": "Rain?", "input": "", "output": "No.", "system": "Be brief."},
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_is_the_same_conversation(name):
    row = parsed(SAME[name])
    assert row == ChatRow((SYSTEM, ASK, ANSWER))
    assert row.text == parsed(SAME["OpenAI"]).text, "so that equal conversations are on one side of the split"


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Rain?", "completion": "No."},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": "Rain?", "chosen": "No.", "rejected": "Yes."},
        {"prompt": "Rain?", "chosen": [ASK, ANSWER], "rejected": [ASK, {"role": "assistant", "content": "Yes."}]},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]},
    ],
)
def test_a_prompt_is_never_learned(values):
    assert parsed(values) == ChatRow((ASK, ANSWER), not_learned=frozenset({0}))


def test_answers_within_a_prompt_are_not_learned():
    row = parsed({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]})
    assert row == ChatRow((ASK, ANSWER, ASK, ANSWER), not_learned=frozenset({0, 1, 2}))


def test_the_chosen_side_alone_may_be_a_whole_conversation():
    assert parsed({"chosen": [ASK, ANSWER], "rejected": []}) == ChatRow((ASK, ANSWER))


def test_alpaca_has_an_input_and_a_history():
    values = {"instruction": "Say it", "input": "again", "output": "No.", "history": [["Rain?", "No."]]}
    assert parsed(values).messages == (ASK, ANSWER, {"role": "user", "content": "Say it\nagain"}, ANSWER)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"train": 0}, {"weight": 0.0, "train": True}])
def test_a_flag_takes_a_message_out_of_the_loss_and_is_not_part_of_it(flag):
    row = parsed({"messages": [ASK, ANSWER | flag, ASK | {"weight": 1}, ANSWER | {"train": True}]})
    assert row == ChatRow((ASK, ANSWER, ASK, ANSWER), not_learned=frozenset({1}))


def test_an_empty_answer_may_be_read():
    empty = {"role": "assistant", "content": ""}
    assert parsed({"messages": [ASK, empty | {"weight": 0}, ASK, ANSWER]}).messages[1] == empty


@pytest.mark.parametrize("wrap", [lambda value: value, json.dumps])
@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"id": "c1", "name": "rain", "arguments": {"in": "Rome"}},
        {"id": "c1", "function": {"name": "rain", "arguments": '{"in": "Rome"}'}},
    ],
)
def test_calls_and_tools_have_one_shape(call, wrap):
    tools = [RAIN, wrap({"name": "rain", "parameters": {"type": "object"}})]
    asks = {"role": "assistant", "content": None, "tool_calls": [wrap(call)]}
    row = parsed({"messages": [ASK, asks, RESULT, ANSWER], "tools": wrap(tools)})
    assert row == ChatRow((ASK, {"role": "assistant", "tool_calls": [CALL]}, RESULT, ANSWER), (RAIN, RAIN))


def test_a_call_of_sharegpt():
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "rain", "arguments": {}}'},
        {"from": "observation", "value": "dry"},
        {"from": "gpt", "value": "No."},
    ]
    call = {"type": "function", "function": {"name": "rain", "arguments": {}}}
    assert parsed({"conversations": turns}).messages == (
        ASK,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "dry"},
        ANSWER,
    )


def test_the_format_and_the_column_can_be_stated():
    both = {"messages": [ASK], "prompt": "Rain?", "completion": "No."}
    assert parsed(both, format="prompt_completion").messages == (ASK, ANSWER)
    assert parsed({"chat": {"turns": [ASK, ANSWER]}}, turns_key="chat.turns").messages == (ASK, ANSWER)
    with_two = {"messages": [ASK], "conversations": [ASK, ANSWER]}
    assert parsed(with_two, turns_key="conversations").messages == (ASK, ANSWER)
