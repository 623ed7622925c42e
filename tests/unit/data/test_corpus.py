from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import build_corpus
from trainer.data.sources.registry import JsonlSourceConfig, SourceConfig, TextSourceConfig


def config(path: str | list[str] = "a.txt", **options: Any) -> DataConfig:
    return DataConfig(sources=[TextSourceConfig(path=path)], cache_dir="cache", **options)


def test_one_file_is_split_without_an_end_of_document(folder):
    (folder / "a.txt").write_text("abcdefghij")
    corpus = build_corpus(config())
    assert corpus.domains == ("text",)
    assert bytes(corpus.train[0].tokens[:]) == b"abcdefghi"
    assert bytes(corpus.validation[0].tokens[:]) == b"j"


def test_weights_are_split_evenly_over_the_domains_of_a_source(folder):
    (folder / "a.txt").write_text("abcd")
    (folder / "rows.jsonl").write_text('{"text": "ab", "d": "x"}\n{"text": "ab", "d": "y"}')
    sources: list[SourceConfig] = [
        TextSourceConfig(path="a.txt", weight=3.0),
        JsonlSourceConfig(path="rows.jsonl", domain_key="d"),
    ]
    corpus = build_corpus(DataConfig(sources=sources, split=SplitConfig(fraction=0.5), cache_dir="cache"))
    assert corpus.domains == ("text", "x", "y")
    assert corpus.weights == (0.75, 0.125, 0.125)


def test_another_weight_takes_the_same_tokens(folder):
    (folder / "a.txt").write_text("abcd")
    one, two = (
        build_corpus(DataConfig(sources=[TextSourceConfig(path="a.txt", weight=weight)], cache_dir="cache"))
        for weight in (1.0, 2.0)
    )
    assert one.folders == two.folders


def test_the_fingerprint_does_not_depend_on_where_files_are(folder, monkeypatch):
    fingerprints = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / f"{name}.txt").write_text("abcdefghij")
        monkeypatch.chdir(folder / name)
        fingerprints.append(build_corpus(config(f"{name}.txt")).fingerprint)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize(
    "other",
    [
        {"split": SplitConfig(fraction=0.2)},
        {"sources": [TextSourceConfig(path="a.txt", domain="b")]},
        {"sources": [TextSourceConfig(path="b.txt")]},
    ],
)
def test_the_fingerprint_depends_on_the_learned_content(folder, other):
    (folder / "a.txt").write_text("abcdefghij")
    (folder / "b.txt").write_text("abcdefghiJ")
    base = config()
    assert build_corpus(base).fingerprint != build_corpus(base.model_copy(update=other)).fingerprint


def test_equal_relative_paths_in_two_working_directories_do_not_share_a_cache(folder, monkeypatch):
    folders = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text(name * 5)
        monkeypatch.chdir(folder / name)
        folders.append(build_corpus(config().model_copy(update={"cache_dir": str(folder / "cache")})).folders)
    assert folders[0] != folders[1]


def test_a_corpus_of_several_files_keeps_their_order(folder):
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"file {i:02d}")
    corpus = build_corpus(config("*.txt", split=SplitConfig(fraction=0.3)))
    for file in (corpus.train[0], corpus.validation[0]):
        texts = bytes(file.tokens[:]).split(b"\xff")
        assert texts == sorted(texts)
        assert file.num_documents == len(texts)
        assert np.array_equal(file.document_of(file.document_starts), np.arange(len(texts)))


def test_a_missing_file_is_named_though_its_tokens_are_in_the_cache(folder, fails):
    (folder / "a.txt").write_text("abcdefghij")
    build_corpus(config())
    (folder / "a.txt").unlink()
    with fails(f"a.txt: no such file; paths are relative to {Path.cwd()}; correct the path"):
        build_corpus(config())
