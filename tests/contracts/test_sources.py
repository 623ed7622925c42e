"""Contract of every registered data source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.registries import SOURCES as CONFIGS
from trainer.contracts.source import CHECKS


def _text(folder: Path) -> dict[str, Any]:
    for name in ("b.txt", "a.txt"):
        (folder / name).write_text(f"text of {name}\n")
    return {"path": str(folder / "*.txt"), "domain": "d"}


def _jsonl(folder: Path) -> dict[str, Any]:
    records = [{"text": "one", "of": "d"}, {"text": "two", "of": "e"}]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {"path": str(folder / "records.jsonl"), "domain_key": "of"}


def _hf(folder: Path) -> dict[str, Any]:
    (folder / "records.csv").write_text("source,target,of\na,b,d\nc,d,e\n")
    return {"path": "csv", "data_files": str(folder / "*.csv"), "text": "{source} = {target}", "domain_key": "of"}


def _chat(folder: Path) -> dict[str, Any]:
    turns = [[{"role": "user", "content": name}, {"role": "assistant", "content": "yes"}] for name in ("one", "two")]
    records = [{"messages": turns[0], "of": "d"}, {"messages": turns[1], "of": "e"}]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {"path": str(folder / "chats.jsonl"), "domain_key": "of"}


def _hf_chat(folder: Path) -> dict[str, Any]:
    return _chat(folder) | {"path": "json", "data_files": str(folder / "chats.jsonl")}


def _one_domain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "domain_key"}


# The smallest working options of each kind. A new source needs a line here.
OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "installed": lambda folder: {"domains": ["cpp"]},  # the other domains take seconds to parse
    "text": _text,
    "jsonl": _jsonl,
    "hf": _hf,
    "hf_stream": lambda folder: _one_domain(_hf(folder)),
    "chat": _chat,
    "hf_chat": _hf_chat,
    "hf_chat_stream": lambda folder: _one_domain(_hf_chat(folder)),
}
DOMAINS = {"installed": {"cpp"}, "text": {"d"}, **{kind: {"d", "e"} for kind in ("jsonl", "hf", "chat", "hf_chat")}}
DOMAINS |= {kind: {kind} for kind in ("hf_stream", "hf_chat_stream")}


@pytest.fixture(params=sorted(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(kind: str, tmp_path: Path) -> Any:
    return CONFIGS[kind](**OPTIONS[kind](tmp_path), weight=2.5)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_source_meets_the_contract(config: Any, check: Callable[[Any], None]) -> None:
    check(config)


def test_a_source_reads_local_files_of_the_configured_domains(config: Any, kind: str) -> None:
    source = config.build()
    assert source.files() and source.weight == 2.5
    assert {document.domain for document in source.documents()} == DOMAINS[kind]
