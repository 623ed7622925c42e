"""The contract of every data source in the registry."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.registries import SOURCES as CONFIGS
from trainer.data.sources.base import Source


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


# The smallest working options of each kind. A new source needs a line here.
OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "installed": lambda folder: {"domains": ["cpp"]},  # the other two take seconds to parse
    "text": _text,
    "jsonl": _jsonl,
    "hf": _hf,
    "hf_stream": lambda folder: {key: value for key, value in _hf(folder).items() if key != "domain_key"},
}
DOMAINS = {"installed": {"cpp"}, "text": {"d"}, "jsonl": {"d", "e"}, "hf": {"d", "e"}, "hf_stream": {"hf_stream"}}


@pytest.fixture(params=sorted(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def source(kind: str, tmp_path: Path) -> Source:
    return CONFIGS[kind](**OPTIONS[kind](tmp_path), weight=2.5).build()


def test_files_exist_and_are_named_once(source):
    files = source.files()
    assert files
    assert all(path.is_file() for path in files)
    assert len(set(files)) == len(files)


def test_documents_are_the_same_every_time(source):
    assert list(source.documents()) == list(source.documents())


def test_parts_in_order_are_the_whole_source(source):
    assert [d for part in source.parts() for d in source.read(part)] == list(source.documents())


def test_parts_are_read_the_same_by_another_process(source, kind, tmp_path):
    again = CONFIGS[kind](**OPTIONS[kind](tmp_path), weight=2.5).build()
    parts = pickle.loads(pickle.dumps(source.parts()))
    assert [d for part in parts for d in again.read(part)] == list(source.documents())


def test_files_are_the_same_every_time(source):
    assert source.files() == source.files()


def test_every_document_has_text_that_utf8_can_hold_and_a_name_of_its_own(source):
    documents = list(source.documents())
    assert all(d.text.strip() and d.text.encode("utf-8") for d in documents)
    assert len({(d.domain, d.name) for d in documents}) == len(documents)


def test_documents_are_of_the_domains_that_were_asked_for(source, kind):
    assert {d.domain for d in source.documents()} == DOMAINS[kind]


def test_the_weight_is_the_one_of_the_config(source):
    assert source.weight == 2.5
