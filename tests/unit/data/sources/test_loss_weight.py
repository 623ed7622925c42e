"""Weights of documents, from their column to the batch; bad ones by place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.batches.stream import TrainStream
from trainer.data.config import DataConfig, Packing, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.records import json_lines
from trainer.data.sources.registry import HfStreamSourceConfig, JsonlSourceConfig, SourceConfig
from trainer.errors import DataError

TEXTS = ["one", "two is longer", "three", "four has more", "five", "six", "seven seven", "eight"]
WEIGHTS = [0.5, 0, 1, 2.25, 3, 1e-300, 0.1, 1]


def _write(name: str, weights: list[Any], texts: list[str] = TEXTS) -> str:
    rows = [{"text": text, "meta": {"gain": weight}} for text, weight in zip(texts, weights, strict=True)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def _corpus(*sources: SourceConfig, kind: Any = "hash", fraction: float = 0.3) -> Corpus:
    split = SplitConfig(kind=kind, fraction=fraction)
    return build_corpus(DataConfig(sources=list(sources), split=split, cache_dir="c"))


def _found(corpus: Corpus) -> dict[str, float]:
    """Weight of each document, on either side."""
    sides = [*corpus.train, *corpus.validation]
    return {
        bytes(file.document(index)[0].tolist()).decode(): file.weight(index)
        for file in sides
        for index in range(file.num_documents)
    }


def _source(path: str, **options: Any) -> JsonlSourceConfig:
    return JsonlSourceConfig(path=path, weight_key="meta.gain", **options)


def test_each_document_keeps_its_weight_through_parts_and_both_sides(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dict(zip(TEXTS, WEIGHTS, strict=True))
    monkeypatch.setattr(json_lines, "_PART_BYTES", 60, raising=True)
    assert _found(_corpus(_source(_write("a.jsonl", WEIGHTS)))) == expected


def test_parts_without_weights_before_and_after_those_with_some_weigh_one(folder: Path) -> None:
    weights = [1, 1, 1, 1, 5, 1, 1, 1]
    for n in range(4):
        _write(f"{n}.jsonl", weights[2 * n : 2 * n + 2], TEXTS[2 * n : 2 * n + 2])
    corpus = _corpus(_source("*.jsonl"))
    assert _found(corpus) == dict(zip(TEXTS, weights, strict=True))
    assert sum(file.weights is not None for file in (*corpus.train, *corpus.validation)) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_divided_or_moved_document_keeps_its_weight(folder: Path, count: int) -> None:
    """One document is cut at its tail; of two on one side, one is moved to the other."""
    corpus = _corpus(_source(_write("a.jsonl", [0.25, 4][:count], TEXTS[1:3][:count])), kind="auto", fraction=1e-6)
    (train,), (validation,) = corpus.train, corpus.validation
    weights = [None if file.weights is None else file.weights.tolist() for file in (train, validation)]
    assert weights in ([[0.25], [0.25]], [[0.25], [4]], [[4], [0.25]]) and (weights[0] == weights[1]) == (count == 1)


def test_weights_of_one_leave_the_files_and_the_cache_of_a_source_without_them(folder: Path) -> None:
    path = _write("a.jsonl", [1] * 8)
    plain, weighted = _corpus(JsonlSourceConfig(path=path)), _corpus(_source(path))
    names = [sorted(file.name for file in corpus.folders[0].glob("jsonl.*")) for corpus in (plain, weighted)]
    assert names[0] == names[1] and not any("weights" in name for name in names[0])
    assert TrainStream(weighted, packing="bfd", seq_len=8, seed=0).rows(0, 2).loss_mask.dtype == torch.bool


def test_a_flipped_bit_of_a_weight_is_noticed(folder: Path) -> None:
    source = _source(_write("a.jsonl", WEIGHTS))
    path = _corpus(source).folders[0] / "jsonl.train.weights"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: its content is not what was written"):
        _corpus(source)
    path.unlink()
    assert _found(_corpus(source)) == dict(zip(TEXTS, WEIGHTS, strict=True)), "built again"


@pytest.mark.parametrize("packing", ["wrapped", "bfd"])
def test_every_target_has_the_weight_of_its_document_and_evaluation_has_none(folder: Path, packing: Packing) -> None:
    corpus = _corpus(_source(_write("a.jsonl", WEIGHTS), prompt="> "), fraction=0.6)
    file = corpus.train[0]
    assert file.weights is not None and len(file.weights) > 2
    stream = TrainStream(corpus, packing=packing, seq_len=6, seed=0)
    rows = stream.rows(0, stream.domain_rows[0].num_rows)
    assert rows.loss_mask.dtype == torch.float64
    ends = np.append(file.document_starts[1:], file.num_tokens + 1)
    for number, (start, answer, end) in enumerate(zip(file.document_starts, file.answer_starts, ends, strict=True)):
        if packing == "bfd":
            here = rows.document_id == number
            learned = int(end - answer)
            assert rows.loss_mask[here].sum() == pytest.approx(learned * file.weights[number])
            assert (rows.loss_mask[here] > 0).sum() == (learned if file.weights[number] else 0), (start, number)
    assert set(rows.target_mask.unique().tolist()) <= {0.0, *file.weights.tolist()}
    (batch,) = evaluation_batches(corpus, 0, packing=packing, seq_len=6, batch_size=99, max_tokens=None)
    assert batch.loss_mask.dtype == torch.bool


def test_a_stream_has_the_same_weights(folder: Path) -> None:
    pytest.importorskip("datasets")
    path = _write("a.jsonl", [1] * 6 + [2] * 2, TEXTS[3:] + TEXTS[:3])
    source = HfStreamSourceConfig(path="json", data_files=path, weight_key="meta.gain", block_tokens=20)
    stream = TrainStream(_corpus(source), packing="bfd", seq_len=16, seed=0)
    stream.load_blocks(0, 4, prefetch=False)
    masks = [stream.rows(slot, 1).loss_mask for slot in range(4)]
    assert [mask.dtype for mask in masks] == [torch.bool] * 2 + [torch.float64] * 2, "blocks without and with weights"
    assert torch.equal(stream.rows(0, 4).loss_mask, torch.cat(masks).double())
    assert masks[2].unique().tolist() == [0, 2]


BAD = {
    "negative": (-1, "'gain' is -1; "),
    "NaN": (float("nan"), None),
    "infinite": (1e999, None),
    "too large": (1e19, "'gain' is 1e+19; "),
    "huge": (10**400, "'gain' is 1000"),
    "string": ("1", "'gain' is a string; "),
    "boolean": (True, "'gain' is a boolean; "),
    "null": (None, "'gain' is null; "),
    "list": ([1], "'gain' is a list; "),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD.keys())
def test_a_weight_that_cannot_be_one_is_a_bad_row_with_its_place(folder: Path, value: Any, message: str | None) -> None:
    rows = [{"text": text, "gain": 1} for text in TEXTS]
    rows[2]["gain"] = value
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"^a\.jsonl:3: ") as raised:
        _corpus(JsonlSourceConfig(path="a.jsonl", weight_key="gain"))
    if message is not None:
        assert str(raised.value).startswith(f"a.jsonl:3: {message}")
        assert "the weight of a document is a number from 0 to 1e+18; correct or remove the record" in str(raised.value)
    corpus = _corpus(JsonlSourceConfig(path="a.jsonl", weight_key="gain", on_bad_row="skip"))
    assert len(_found(corpus)) == 7 and corpus.skipped[0].records.count == 1


def test_a_missing_weight_is_a_bad_row(folder: Path) -> None:
    Path("a.jsonl").write_text('{"text": "a", "gain": 1}\n{"text": "b", "gains": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no column 'gain'; .*did you mean 'gains'"):
        _corpus(JsonlSourceConfig(path="a.jsonl", weight_key="gain"))
