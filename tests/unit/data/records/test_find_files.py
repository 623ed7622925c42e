from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from trainer.data.config import DataConfig
from trainer.data.corpus import build_corpus
from trainer.data.records import find_files as module
from trainer.data.records.find_files import FORMATS, JSON_LINES, TEXT, describe_folders
from trainer.data.records.registry import HfRecordsConfig, JsonlRecordsConfig
from trainer.data.sources.registry import HfSourceConfig, SourceConfig, TextSourceConfig
from trainer.data.tokenizers.registry import FileTokenizerConfig


def find_files(patterns: str | list[str]) -> list[Path]:
    return module.find_files(patterns, TEXT)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")


def test_a_path_is_found(folder):
    (folder / "a.txt").write_text("a")
    assert find_files("a.txt") == [Path("a.txt")]


def test_matches_of_a_glob_are_sorted(folder):
    for name in ("b.txt", "a.txt", "c.md"):
        (folder / name).write_text("x")
    assert find_files("*.txt") == [Path("a.txt"), Path("b.txt")]


def test_two_stars_stand_for_any_number_of_folders(folder):
    (folder / "x" / "y").mkdir(parents=True)
    for name in ("a.txt", "x/b.txt", "x/y/c.txt"):
        (folder / name).write_text("x")
    assert find_files("**/*.txt") == [Path("a.txt"), Path("x/b.txt"), Path("x/y/c.txt")]


def test_patterns_keep_their_order_and_name_each_file_once(folder):
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("x")
    assert find_files(["b.txt", "*.txt"]) == [Path("b.txt"), Path("a.txt")]


def test_a_file_with_brackets_in_its_name_is_found(folder):
    (folder / "a[1].txt").write_text("x")
    assert find_files("a[1].txt") == [Path("a[1].txt")]


def test_an_absolute_glob_works(folder):
    (folder / "a.txt").write_text("x")
    assert find_files(str(folder / "*.txt")) == [folder / "a.txt"]


def test_a_missing_file_is_named(folder, fails):
    with fails(f"a.txt: no such file; paths are relative to {folder}; correct the path"):
        find_files("a.txt")


def test_a_glob_without_a_match_is_named(folder, fails):
    (folder / "x.txt").mkdir()
    with fails(f"*.txt: the glob matches no file; globs are relative to {folder}; correct the glob"):
        find_files("*.txt")


def test_a_broken_link_is_not_passed_over(folder, fails):
    (folder / "a.txt").symlink_to("nowhere")
    with fails("a.txt: matched by *.txt, but it is not a file (a broken link?); remove it"):
        find_files("*.txt")


def test_a_folder_that_may_not_be_read_is_named(folder, monkeypatch, fails):
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with fails("x/a.txt: cannot be read (Permission denied); make it readable for this user"):
        find_files("x/a.txt")


def test_braces_stand_for_either(folder):
    touch("a.txt", "b.md", "c.rst", "x/d.txt", "x/e.md")
    assert find_files("*.{txt,md}") == [Path("a.txt"), Path("b.md")]
    assert find_files("**/*.{md,txt}") == [Path("a.txt"), Path("b.md"), Path("x/d.txt"), Path("x/e.md")]
    assert find_files("{a,x/d}.{txt,{md,no}*}") == [Path("a.txt"), Path("x/d.txt")]
    assert find_files("{c,b}.{rst,md}*") == [Path("b.md"), Path("c.rst")]


def test_a_path_among_braces_that_is_missing_is_named(folder, fails):
    touch("a.txt")
    with fails(f"b.txt: no such file; paths are relative to {folder}; correct the path"):
        find_files("{a,b}.txt")


def test_braces_that_are_no_choice_are_letters(folder):
    touch("a{1}.txt", "b{1,2}.txt")
    assert find_files("a{1}.txt") == [Path("a{1}.txt")]
    assert find_files("b{1,2}.txt") == [Path("b{1,2}.txt")]
    assert find_files("*{1}.txt") == [Path("a{1}.txt")]


def test_of_a_folder_all_files_of_the_kind_are_taken_and_no_hidden_ones(folder):
    touch(
        "x/b.txt", "x/a-c.md", "x/a/c.txt.gz", "x/a/d.RST", "x/e.jsonl", "x/.hidden.txt", "x/.git/f.txt", "x/g", "y.txt"
    )
    (folder / "x/link").symlink_to(folder / "x/a")
    assert find_files("x") == [Path(f"x/{name}") for name in ("a-c.md", "a/c.txt.gz", "a/d.RST", "b.txt")]
    assert find_files(["y.txt", "x/"]) == [Path("y.txt"), *find_files("x")]
    assert describe_folders(["y.txt", "x"], TEXT) == [
        "x: is a folder; read from it: 1 .md, 1 .rst, 2 .txt; left out: 1 .jsonl, 1 without a suffix"
    ]
    assert module.find_files("x", JSON_LINES) == [Path("x/e.jsonl")]


@pytest.mark.parametrize(
    ("names", "kind", "rest"),
    [
        (
            ["x/a.jsonl", "x/b/c.jsonl.zst"],
            TEXT,
            "text reads (.txt, .text, .md, .rst); it has 2 .jsonl; use kind: jsonl",
        ),
        (["x/a.txt"], JSON_LINES, "jsonl reads (.jsonl, .ndjson); it has 1 .txt; use kind: text"),
        (
            ["x/a.parquet"],
            TEXT,
            "text reads (.txt, .text, .md, .rst); it has 1 .parquet; use kind: hf, path: parquet, data_files: x",
        ),
        (
            ["x/a.py", "x/b.py", "x/c.c"],
            TEXT,
            "text reads (.txt, .text, .md, .rst); it has 1 .c, 2 .py; use a glob such as x/**/*.py",
        ),
        ([], FORMATS["csv"], "hf reads (.csv); it has no files; use a glob such as x/**/*"),
    ],
)
def test_the_error_for_a_folder_without_matching_files_suggests_a_kind(folder, fails, names, kind, rest):
    Path("x").mkdir()
    touch(*names)
    with fails(f"x: is a folder without a file that kind {rest}"):
        module.find_files("x", kind)


@pytest.mark.parametrize("address", ["https://example.com/a.jsonl", "s3://a/*.txt", "hf://datasets/a/b/{c,d}.txt"])
def test_an_address_is_refused_with_the_kind_that_reads_it(folder, fails, address):
    with fails(
        f"{address}: is an address, and text reads local files; use kind: hf with path: text and data_files, "
        "or download it"
    ):
        find_files(address)


def test_folders_and_braces_work_for_formats_of_datasets_too(folder):
    for name, text in (("x/a.parquet", "a"), ("x/y/b.parquet", "b"), ("x/c.pq", "c")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [text]}), name)

    def texts(data_files: str) -> list[str]:
        return [
            record.values["text"]
            for record in HfRecordsConfig(path="parquet", data_files=data_files).reader().records()
        ]

    assert texts("x") == ["a", "b"]
    assert texts("x/**/*.{parquet,pq}") == ["a", "c", "b"]


def test_a_corpus_remarks_which_files_of_a_folder_are_read(folder):
    touch("x/a.txt", "x/b.md")
    pq.write_table(pa.table({"text": [f"record {i}" for i in range(40)]}), "x/c.parquet")
    sources = [TextSourceConfig(path="x"), HfSourceConfig(path="parquet", data_files="x")]
    data = DataConfig.model_validate(
        {"sources": [s.model_dump() for s in sources], "cache_dir": "cache", "split": {"fraction": 0.5}}
    )
    Path("x/a.txt").write_text("hold this out")
    corpus = build_corpus(data)
    assert corpus.remarks == (
        "data.sources.0: x: is a folder; read from it: 1 .md, 1 .txt; left out: 1 .parquet",
        "data.sources.1: x: is a folder; read from it: 1 .parquet; left out: 1 .md, 1 .txt",
    )


HOMES: dict[str, Callable[[str], Any]] = {
    "text": lambda path: TextSourceConfig(path=path).path,
    "a list": lambda path: JsonlRecordsConfig(path=["a", path]).path[1],
    "a folder of datasets": lambda path: HfRecordsConfig(path=path).path,
    "files of datasets": lambda path: HfRecordsConfig(path="csv", data_files=path).data_files,
    "the cache": lambda path: DataConfig(cache_dir=path).cache_dir,
    "a tokenizer": lambda path: FileTokenizerConfig(path=path).path,
}


@pytest.mark.parametrize("made", HOMES.values(), ids=HOMES.keys())
def test_a_leading_tilde_is_the_home_folder(folder, monkeypatch, made):
    monkeypatch.setenv("HOME", str(folder))
    assert made("~/a/*.txt") == f"{folder}/a/*.txt"
    assert made("a~/~") == "a~/~"


def test_pickles_are_refused():
    with pytest.raises(ValidationError, match="pandas reads pickles, which can run code; write the data as parquet"):
        TypeAdapter(SourceConfig).validate_python({"kind": "hf", "path": "pandas", "data_files": "a.pkl"})
