"""Bad data: a one-line error with the location, and exit code 3."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import build_corpus
from trainer.data.records import json_lines, text_files
from trainer.data.sources.registry import HfSourceConfig, JsonlSourceConfig, SourceConfig, TextSourceConfig
from trainer.data.token_cache.read_tasks import ReadTask
from trainer.errors import DataError

Write = Callable[[Path], None]
TEXT = TextSourceConfig(path="a.txt")
JSONL = JsonlSourceConfig(path="a.jsonl")
PARQUET = HfSourceConfig(path="parquet", data_files="a.parquet")


class Case(NamedTuple):
    write: Write
    source: SourceConfig
    message: str
    """Start of the message."""


def file(name: str, content: bytes | str) -> Write:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def parquet(**columns: list[Any]) -> Write:
    return lambda folder: pq.write_table(pa.table(columns), folder / "a.parquet")


def records(*given: dict[str, Any], name: str = "a.jsonl") -> Write:
    return file(name, "".join(json.dumps(record) + "\n" for record in given))


def nothing(folder: Path) -> None:
    """Leave the folder empty."""


def both(one: Write, two: Write) -> Write:
    def write(folder: Path) -> None:
        one(folder)
        two(folder)

    return write


GOOD = [{"text": f"text {i}"} for i in range(10_000)]
CASES = {
    "missing text": Case(nothing, TEXT, "a.txt: no such file; paths are relative to "),
    "missing jsonl": Case(nothing, JSONL, "a.jsonl: no such file; paths are relative to "),
    "missing parquet": Case(nothing, PARQUET, "a.parquet: no such file; paths are relative to "),
    "glob of nothing": Case(nothing, TextSourceConfig(path="*.txt"), "*.txt: the glob matches no file; "),
    "directory": Case(lambda f: (f / "a.txt").mkdir(), TEXT, "a.txt: is a folder without a file that kind text reads "),
    "directory as jsonl": Case(lambda f: (f / "a.jsonl").mkdir(), JSONL, "a.jsonl: is a folder without a file "),
    "broken link": Case(
        lambda f: (f / "a.txt").symlink_to("gone"), TextSourceConfig(path="*.txt"), "a.txt: matched by *.txt, but it is"
    ),
    "name not UTF-8": Case(
        lambda f: (f / os.fsdecode(b"caf\xe9.txt")).touch(),
        TextSourceConfig(path="*.txt"),
        "'caf\\udce9.txt': its name is not UTF-8, ",
    ),
    "empty text": Case(file("a.txt", ""), TEXT, "a.txt: holds no text "),
    "whitespace": Case(file("a.txt", " \n\t\n"), TEXT, "a.txt: holds no text "),
    "empty jsonl": Case(file("a.jsonl", ""), JSONL, "a.jsonl: holds no records "),
    "blank lines": Case(file("a.jsonl", "\n\n"), JSONL, "a.jsonl: holds no records "),
    "empty parquet": Case(parquet(text=[]), PARQUET, "{folder}/a.parquet: "),
    "text not UTF-8": Case(file("a.txt", b"ab\ncd\xff"), TEXT, "a.txt:2: byte 0xff at offset 5 is not UTF-8; "),
    "jsonl not UTF-8": Case(
        file("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'), JSONL, "a.jsonl:2: byte 0xe9 at offset 24 is not UTF-8; "
    ),
    "truncated gzip": Case(
        file("a.txt.gz", gzip.compress(b"text " * 999)[:-9]),
        TextSourceConfig(path="a.txt.gz"),
        "a.txt.gz: damaged gzip",
    ),
    "not gzip": Case(file("a.txt.gz", "plain"), TextSourceConfig(path="a.txt.gz"), "a.txt.gz: damaged gzip data ("),
    "truncated zst": Case(
        file("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 999)[:-3]),
        JsonlSourceConfig(path="a.jsonl.zst"),
        "a.jsonl.zst: damaged zstd data (",
    ),
    "truncated parquet": Case(
        both(parquet(text=["a"] * 99), lambda f: os.truncate(f / "a.parquet", 300)), PARQUET, "parquet:train: cannot be"
    ),
    "not JSON": Case(file("a.jsonl", '{"text": "a"}\n{"text": \n'), JSONL, "a.jsonl:2: not JSON (Expecting value at "),
    "record is a list": Case(file("a.jsonl", '["a"]\n'), JSONL, "a.jsonl:1: the record is a list; "),
    "missing column": Case(
        records({"text": "a"}, {"txt": "b"}),
        JSONL,
        "a.jsonl:2: no column 'text'; the record has txt (did you mean 'txt'?); ",
    ),
    "missing column of parquet": Case(
        parquet(txt=["a"]), PARQUET, "{folder}/a.parquet: record 1: no column 'text'; the record has txt (did you mean"
    ),
    "missing column of a csv": Case(
        file("a.csv", "txt,n\na,1\n"),
        HfSourceConfig(path="csv", data_files="a.csv"),
        "{folder}/a.csv: record 1: no column 'text'; the record has txt, n (did you mean 'txt'?); ",
    ),
    "wrong type on record 10 000": Case(
        records(*GOOD[1:], {"text": 3}), JSONL, "a.jsonl:10000: 'text' is a number; it must be a string; "
    ),
    "wrong type on record 10 000 through datasets": Case(
        records(*GOOD[1:], {"text": 3}),
        HfSourceConfig(path="json", data_files="a.jsonl"),
        "{folder}/a.jsonl:10000: 'text' is a number; it must be a string; ",
    ),
    "null on record 10 000 of a parquet": Case(
        parquet(text=[record["text"] for record in GOOD[1:]] + [None]),
        PARQUET,
        "{folder}/a.parquet: record 10000: 'text' is null; it must be a string; ",
    ),
    "column of numbers": Case(
        parquet(text=[1, 2]), PARQUET, "{folder}/a.parquet: record 1: 'text' is a number; it must"
    ),
    "empty record": Case(records({"text": "a"}, {"text": " "}), JSONL, "a.jsonl:2: '{{text}}' holds no text "),
    "lone surrogate": Case(
        file("a.jsonl", '{"text": "\\ud800"}\n'), JSONL, "a.jsonl:1: 'text' has the lone surrogate \\ud800 at character"
    ),
    "label out of range": Case(
        records({"text": "a", "label": 2}),
        JsonlSourceConfig(path="a.jsonl", text="{text} {label:bad|good}"),
        "a.jsonl:1: 'label' is 2; it must be a whole number from 0 to 1; ",
    ),
    "filter of another type": Case(
        records({"text": "a", "stars": "5"}),
        JsonlSourceConfig(path="a.jsonl", filters=[{"column": "stars", "at_least": 4}]),  # type: ignore[list-item]
        "a.jsonl:1: 'stars' is a string; at_least and at_most need a number; ",
    ),
    "filter that excludes every record": Case(
        records({"text": "a"}),
        JsonlSourceConfig(path="a.jsonl", filters=[{"column": "text", "one_of": ["b"]}]),  # type: ignore[list-item]
        "data.sources: source 0 holds no documents; ",
    ),
    "invalid domain name": Case(
        records({"text": "a", "of": "../x"}),
        JsonlSourceConfig(path="a.jsonl", domain_key="of"),
        "a.jsonl:1: domain '../x'",
    ),
    "too many domains": Case(
        records(*({"text": "a", "of": f"d{i}"} for i in range(200))),
        JsonlSourceConfig(path="a.jsonl", domain_key="of"),
        "data.sources: more than 128 domains in one source; ",
    ),
    "duplicate shard": Case(
        both(records({"text": "a"}), records({"text": "a"}, name="b.jsonl")),
        JsonlSourceConfig(path="*.jsonl"),
        "b.jsonl: is a copy of a.jsonl; each record is read once; ",
    ),
    "too little to hold out": Case(file("a.txt", "x"), TEXT, "data.split: domain text has too little text to hold out"),
    "unknown split": Case(
        lambda f: (f / "set").mkdir() or records({"text": "a"}, name="set/train.jsonl")(f),
        HfSourceConfig(path="set", split="test"),
        "set:test: no split 'test'; the data set has train; ",
    ),
    "hub unreachable": Case(
        nothing, HfSourceConfig(path="someone/some-set"), "someone/some-set:train: cannot be reached"
    ),
}


@pytest.fixture(autouse=True)
def _offline_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def message(source: SourceConfig) -> str:
    with pytest.raises(DataError) as error:
        build_corpus(DataConfig(sources=[source], split=SplitConfig(fraction=0.5), cache_dir="cache"))
    assert error.value.exit_code == 3
    kept = {".lock", ".parts"}  # finished parts are kept for the next run
    assert [path.name for path in Path("cache").glob("*") if path.suffix not in kept] == []
    return str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_bad_data_is_a_one_line_error_with_the_location(name, tmp_path):
    case = CASES[name]
    case.write(tmp_path)
    line = message(case.source)
    assert line.startswith(case.message.format(folder=tmp_path.resolve()))
    assert "\n" not in line


def test_a_record_of_200_mb_is_refused(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as lines:
        lines.write(b'{"text": "a"}\n{"text": "')
        lines.truncate(200 << 20)
    assert message(JSONL).startswith(f"a.jsonl:2: more than {json_lines.MAX_RECORD_BYTES} bytes in one record; ")


def test_a_file_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_text("a" * (1 << 21))
    assert message(TEXT).startswith("a.txt: more than 1048576 bytes in one document; ")


def test_a_file_deleted_during_reading_is_reported(tmp_path, monkeypatch):
    records({"text": "a"}, {"text": "b"})(tmp_path)
    run = ReadTask.run
    monkeypatch.setattr(ReadTask, "run", lambda *args: (run(*args), (tmp_path / "a.jsonl").unlink()))
    assert message(JSONL).startswith("a.jsonl: cannot be read (No such file or directory); ")


def test_a_file_changed_during_reading_is_reported(tmp_path, monkeypatch):
    records({"text": "a"}, {"text": "b"})(tmp_path)
    run = ReadTask.run
    monkeypatch.setattr(ReadTask, "run", lambda *args: (run(*args), (tmp_path / "a.jsonl").write_text("x")))
    assert message(JSONL).startswith("a.jsonl: changed during reading; ")
