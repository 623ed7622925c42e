"""A conversation: its answers, and what it forgets."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.exported_runs import make_run
from trainer.checkpoint.choice import NEWEST
from trainer.data.chat.chat_template import ChatRefused
from trainer.data.chat.config import ChatTemplateConfig
from trainer.data.chat.find_template import find_template, template_files
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.models.sampling import SamplingOptions
from trainer.training.chat_session import AnswerOptions, ChatSession, TooLong
from trainer.training.load_trained import load_trained
from trainer.training.run_template import chat_encoder, kept_template

MODEL = {
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 16,
    "seq_len": 96,
    "moe": {"num_experts": 4, "router": {"kind": "top_k", "top_k": 2}},
}
Start = Callable[..., ChatSession]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return config and folder of a run that keeps a template."""
    config, folder, _ = make_run(tmp_path_factory.mktemp("chat"), MODEL)
    template = find_template(ChatTemplateConfig(), config.data.tokenizer, ByteTokenizer())
    for name, text in template_files(template).items():
        folder.write(folder.path / name, text)
    return config, folder


@pytest.fixture(scope="module")
def start(run: tuple[Any, Any]) -> Start:
    """Return what starts a conversation with the run."""
    config, folder = run
    engine, tokenizer, _ = load_trained(config, folder, NEWEST, warn=print)
    template = kept_template(config, folder)
    assert template is not None

    def begin(
        *, system: str | None = None, temperature: float = 0.0, max_tokens: int = 12, seed: int = 0
    ) -> ChatSession:
        sampling = SamplingOptions(temperature=temperature)
        answers = AnswerOptions(sampling=sampling, max_tokens=max_tokens, seed=seed)
        return ChatSession(engine.model, chat_encoder(config, template, tokenizer), answers, system=system)

    return begin


def test_only_new_tokens_are_computed_in_each_turn(start: Start) -> None:
    session = start(max_tokens=1)
    computed = []
    for said in ("Hello", "a", "b"):
        before = session.num_computed
        assert len("".join(session.answer(said))) <= 1
        computed.append(session.num_computed - before)
    assert computed[0] == len("uHelloea"), "marker, text, end, marker"
    assert all(count <= len("\ufffd".encode()) + len("eXea") for count in computed[1:])


def test_the_oldest_exchanges_are_forgotten_when_the_row_is_full(start: Start) -> None:
    session = start(max_tokens=8)
    dropped = 0
    for number in range(12):
        "".join(session.answer(f"message {number}"))
        dropped += session.last.dropped
        users = [message["content"] for message in session.messages() if message["role"] == "user"]
        assert users == [f"message {n}" for n in range(dropped, number + 1)]
    assert dropped > 5


def test_a_message_that_never_fits_is_refused_and_forgets_nothing(start: Start) -> None:
    session = start()
    "".join(session.answer("Hello"))
    with pytest.raises(TooLong, match=r"the message has 203 tokens .* and 84 fit into a row of 96 .*; write less"):
        "".join(session.answer("x" * 200))
    assert len(session.messages()) == 2
    assert session.last.dropped == 0


def test_an_answer_ends_with_the_row(start: Start) -> None:
    session = start(max_tokens=500, temperature=1.0, seed=3)
    answer = "".join(session.answer("Hello"))
    assert session.last.ended_by in ("the row of 96 tokens is full", None)
    assert len(answer) <= 96


def test_undo_reset_and_the_seed_repeat_an_answer(start: Start) -> None:
    session = start(temperature=1.0, seed=5)
    first = "".join(session.answer("Hello"))
    assert "".join(session.answer("Hello")) != first
    assert session.undo() and session.undo() and not session.undo()
    session.reset()
    assert "".join(session.answer("Hello")) == first
    assert "".join(start(temperature=1.0, seed=5).answer("Hello")) == first


def test_a_closed_answer_keeps_what_was_said(start: Start) -> None:
    session = start()
    pieces = session.answer("Hello")
    said = next(pieces)
    pieces.close()
    assert session.messages()[1:] == [{"role": "assistant", "content": said}]
    assert json.loads(session.as_row()) == {"messages": session.messages()}


def test_a_refused_conversation_keeps_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start(system="s")
    monkeypatch.setattr(session._encoder.template, "text", "{{ raise_exception('no system') }}")
    monkeypatch.setattr(session._encoder.template, "_compiled", None)
    with pytest.raises(ChatRefused, match="no system"):
        "".join(session.answer("Hello"))
    assert session.messages() == [{"role": "system", "content": "s"}]
