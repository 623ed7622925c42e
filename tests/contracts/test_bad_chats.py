"""Bad conversations: a one-line error with file and row, exit code 3, and nothing of them in the cache."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from trainer.data.chat.config import ChatTemplateConfig
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.sources.registry import ChatSourceConfig
from trainer.errors import DataError

ASK, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
CALL = {"name": "rain", "arguments": {"in": "Rome"}}
PAIR = [ASK, ANSWER]


class Case(NamedTuple):
    row: Any
    """Row 2 of the file: an object, or the text of the line."""
    message: str
    """Start of the message, after file and row."""
    options: Mapping[str, Any] = MappingProxyType({})
    template: str | None = None
    number: int = 2
    """Number of the row; 1 where the options or the template make the good row before it a bad one."""


def turns(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def calling(call: Any) -> dict[str, Any]:
    return turns(ASK, {"role": "assistant", "tool_calls": [call]})


CASES: dict[str, Case] = {
    "unknown role": Case(turns({"role": "robot", "content": "x"}, ANSWER), "messages.0 has the role 'robot'; roles"),
    "unknown role of ShareGPT": Case(
        {"conversations": [{"from": "martian", "value": "x"}]}, "conversations.0 has the role 'martian'; roles are"
    ),
    "role of another type": Case(turns({"role": 3, "content": "x"}, ANSWER), "messages.0 has no role; roles are"),
    "no role": Case(turns({"content": "x"}, ANSWER), "messages.0 has no role; roles are"),
    "no assistant": Case(turns(ASK), "has no turn of assistant, but user; nothing is learned (learn: assistant)"),
    "only system": Case(turns({"role": "system", "content": "x"}), "has no turn of assistant, but system; nothing"),
    "a role that never occurs": Case(
        turns(*PAIR),
        "has no turn of tool, but user, assistant; nothing is learned (learn: tool)",
        {"learn": ["tool"]},
        number=1,
    ),
    "nothing learned by its flags": Case(
        turns(ASK, ANSWER | {"weight": 0}), "takes every turn out of the loss that is to be learned"
    ),
    "no last turn": Case(turns(*PAIR, ASK), "nothing is learned in its 21 tokens of a row", {"learn": "last_turn"}),
    "messages empty": Case(turns(), "messages is empty; a conversation needs a question and an answer"),
    "messages missing": Case({"text": "x"}, "has no conversation, but text; it needs messages or"),
    "messages null": Case({"messages": None}, "has no conversation, but no columns; it needs"),
    "messages not a list": Case({"messages": "hi"}, "messages is a string; it must be a list of turns"),
    "a turn that is text": Case(turns("hi"), "messages.0 is a string; a turn is an object with role and content"),
    "nested too deep": Case(turns(PAIR), "messages.0 is a list; a turn is an object"),
    "content null": Case(turns(ASK, {"role": "assistant", "content": None}), "messages.1 (assistant) has no content"),
    "content a number": Case(turns({"role": "user", "content": 3}, ANSWER), "messages.0.content is a number; it must"),
    "content with an image": Case(
        turns({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
        "messages.0.content.0 is a part of type 'image_url'; only text is read",
    ),
    "content part without text": Case(
        turns({"role": "user", "content": [{"type": "text"}]}, ANSWER), "messages.0.content.0 has no text"
    ),
    "empty answer": Case(turns(ASK, {"role": "assistant", "content": " "}), "messages.1 is an answer without text"),
    "two formats": Case(
        turns(*PAIR, prompt="x", completion="y"), "has messages and prompt/completion, which are 2 formats; set"
    ),
    "two columns of turns": Case(turns(*PAIR, conversations=PAIR), "has both messages and conversations; set"),
    "the stated format is absent": Case(
        turns(*PAIR), "has no conversation, but messages", {"format": "alpaca"}, number=1
    ),
    "the stated column is absent": Case(
        turns(*PAIR), "no column 'dialog'; the record has", {"turns_key": "dialog"}, number=1
    ),
    "two prompts": Case(
        {"prompt": "why?", "chosen": [{"role": "user", "content": "when?"}, ANSWER], "rejected": "x"},
        "chosen begins with a question that is not the prompt",
    ),
    "a pair without a prompt": Case({"chosen": "yes", "rejected": "no"}, "chosen begins with an answer, and there"),
    "two system prompts": Case(
        turns({"role": "system", "content": "a"}, *PAIR, system="b"), "has a column system and a turn of system"
    ),
    "history of single texts": Case(
        {"instruction": "a", "output": "b", "history": ["c"]}, "history.0 is not a pair of strings"
    ),
    "instruction of another type": Case({"instruction": 1, "output": "b"}, "'instruction' is a number; it must be"),
    "flag of another value": Case(turns(ASK, ANSWER | {"weight": 0.5}), "messages.1.weight is 0.5; it must be 0 or 1"),
    "call without a name": Case(calling({"function": {"arguments": {}}}), "messages.1.tool_calls.0 has no name"),
    "call with arguments of a list": Case(
        calling(CALL | {"arguments": [1]}), "messages.1.tool_calls.0: arguments is a list; it must be an object"
    ),
    "call with arguments that are not JSON": Case(
        calling(CALL | {"arguments": "{in: Rome}"}), "messages.1.tool_calls.0: arguments is not JSON ("
    ),
    "calls that are no list": Case(turns(ASK, {"role": "assistant", "tool_calls": CALL}), "messages.1.tool_calls is"),
    "call by the user": Case(turns(ASK | {"tool_calls": [CALL]}, ANSWER), "messages.0.tool_calls is in a turn of user"),
    "result without a call": Case(
        turns(ASK, {"role": "tool", "content": "wet"}, ANSWER), "messages.1 is the result of a tool, and no assistant"
    ),
    "result of another call": Case(
        turns(
            ASK,
            {"role": "assistant", "tool_calls": [CALL | {"id": "c1"}]},
            {"role": "tool", "content": "wet", "tool_call_id": "c2"},
        ),
        "messages.2 answers the call 'c2'; the turn before has 'c1'",
    ),
    "tools that are no list": Case(turns(*PAIR, tools={"name": "rain"}), "tools is an object; it must be a list"),
    "tool without a name": Case(turns(*PAIR, tools=[{"type": "function"}]), "tools.0 has no name"),
    "lone surrogate": Case(
        turns({"role": "user", "content": "a\ud800"}, ANSWER), "messages.0.content: 'text' has the lone surrogate"
    ),
    "lone surrogate in arguments": Case(
        calling({"name": "rain", "arguments": {"in": "\udfff"}}), "messages.1.tool_calls.0.arguments.in: 'text' has the"
    ),
    "a number that JSON lacks": Case(
        calling(CALL | {"arguments": {"in": float("nan")}}), "messages.1.tool_calls.0.arguments.in is nan, which JSON"
    ),
    "a key twice": Case(
        '{"messages": [], "messages": [{"role": "user", "content": "x"}]}',
        "not JSON (an object has the key 'messages' twice)",
    ),
    "a key twice in a turn": Case(
        '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "not JSON (an object has the key"
    ),
    "not JSON": Case('{"messages": [', "not JSON ("),
    "a list": Case('[{"role": "user", "content": "x"}]', "the record is a list; every record is an object"),
    "not UTF-8": Case(b'{"messages": "\xff"}', "byte 0xff at offset "),
    "longer than a row": Case(
        turns(ASK, {"role": "assistant", "content": "x" * 200}),
        "the conversation has 208 tokens, and a row of model.seq_len 64 takes 63; set a larger",
    ),
    "a turn of 1 MB": Case(
        turns({"role": "user", "content": "é" * (1 << 19)}, ANSWER), "the conversation has 1048587 tokens, and a row of"
    ),
    "an exchange longer than a row": Case(
        turns(*PAIR, ASK, {"role": "assistant", "content": "x" * 200}),
        "its last exchange alone has 208 tokens, and a row of model.seq_len 64 takes 63",
        {"truncate": "left"},
    ),
    "only a question in the row": Case(
        turns({"role": "user", "content": "x" * 200}, ANSWER),
        "nothing is learned in its 63 tokens of a row (learn: assistant)",
        {"truncate": "right"},
    ),
    "the template refuses equal roles in a row": Case(
        turns(ASK, ASK, ANSWER), "strict.jinja:1: refuses the conversation: roles must alternate", template="strict"
    ),
    "the template writes without end": Case(turns(*PAIR), "huge.jinja:1: ", template="huge", number=1),
    "the template marks no answers": Case(
        turns(ASK, ANSWER, ASK, ANSWER), "rewrites.jinja: message 2", template="rewrites", number=1
    ),
    "a weight of another type": Case(
        turns(*PAIR, gain="x"), "'gain' is a string; the weight of a document is", {"weight_key": "gain"}
    ),
}

_TEMPLATES = {
    "strict": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}",
    "huge": "{{ messages[0].content * 999999999 }}",
    "rewrites": "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}",
    "broken": "{% for m in messages %}{{ m.content }",
    "reads": "{% include '/etc/passwd' %}",
    "escapes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
}
UNUSABLE = {
    "gone": "data.chat_template.path: gone.jinja: no such file",
    "broken": "broken.jinja:1: unexpected '}'",
    "reads": "reads.jinja: line 1: reads another file (include)",
    "escapes": "escapes.jinja:1: does what is not allowed: access to attribute '__class__'",
}


def build(rows: list[Any], options: Mapping[str, Any] = MappingProxyType({}), template: str | None = None) -> Corpus:
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
             for row in rows]  # fmt: skip
    Path("a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    config = DataConfig(
        sources=[ChatSourceConfig(path="a.jsonl", **options)],
        packing="bfd",
        chat_template=ChatTemplateConfig(path=template and f"{template}.jinja"),
        split=SplitConfig(kind="hash", fraction=0.5),
        cache_dir="cache",
    )
    return build_corpus(config, seq_len=64)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in _TEMPLATES.items():
        (tmp_path / f"{name}.jinja").write_text(text)
    return tmp_path


def error_of(rows: list[Any], **given: Any) -> str:
    with pytest.raises(DataError) as error:
        build(rows, **given)
    assert error.value.exit_code == 3
    assert [path for path in Path("cache").rglob("*") if path.suffix != ".lock"] == []
    line = str(error.value)
    assert "\n" not in line and len(line) < 900
    return line


@pytest.mark.parametrize("name", CASES)
def test_a_bad_conversation_is_a_one_line_error_with_file_and_row(name):
    case = CASES[name]
    line = error_of([turns(*PAIR, gain=1), case.row], options=case.options, template=case.template)
    assert line.startswith(f"a.jsonl:{case.number}: {case.message}")
    assert line.endswith(", or skip it: on_bad_row: skip")


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_template_that_no_conversation_can_use_is_named_without_a_row(name):
    assert error_of([turns(*PAIR)], options={"on_bad_row": "skip"}, template=name).startswith(UNUSABLE[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "wrapped"}, "packing: wrapped, whose windows part questions from answers, but sources.0 holds"),
        ({"learn": []}, "learn"),
        ({"learn": ["robot"]}, "learn"),
        ({"learn": ["user", "user"]}, "learn: user is named twice"),
        ({"truncate": "middle"}, "truncate"),
        ({"format": "alpaca", "turns_key": "t"}, "turns_key: 't', but format alpaca has columns of its own"),
    ],
)
def test_a_bad_option_is_a_config_error(options, message):
    packing = options.get("packing", "bfd")
    source = {"kind": "chat", "path": "a.jsonl", **{key: value for key, value in options.items() if key != "packing"}}
    with pytest.raises(ValidationError, match=re.escape(message)):
        DataConfig.model_validate({"sources": [source], "packing": packing})


def test_bad_conversations_are_skipped_and_counted():
    good = [turns({"role": "user", "content": f"q{i}"}, ANSWER) for i in range(12)]
    bad = [case.row for case in CASES.values() if not case.options and not case.template]
    rows = [row for pair in zip(good * 9, bad, strict=False) for row in pair]
    corpus = build(rows, {"on_bad_row": "skip"})
    (skipped,) = corpus.skipped
    assert skipped.records.count == len(bad)
    assert skipped.records.reasons["with an unknown role"] == 4
    found = sum(file.num_documents for file in (corpus.train[0], corpus.validation[0]))
    assert found == len(rows) - len(bad)


def test_a_marker_in_a_message_is_text():
    said = "<|end|><|assistant|>\xff<|endoftext|>"
    corpus = build([turns(ASK | {"content": said + str(i)}, ANSWER) for i in range(8)])
    tokens = bytes(corpus.train[0].document(0)[0].tolist())
    assert tokens.startswith(b"\xf9" + said.encode()) and tokens.count(b"\xfe") == 2
