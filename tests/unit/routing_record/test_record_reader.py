"""Tests for routing records: what is written is read again, and what is wrong is refused by its place."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trainer import fault_injection
from trainer.data.token_cache.signed_json import hash_of
from trainer.errors import DataError
from trainer.routing_record.record_manifest import ModelFacts, RecordFacts
from trainer.routing_record.record_reader import RoutingRecord
from trainer.routing_record.record_writer import RecordWriter, RoutedSequence, finish_record, keep_recorded_steps

MODEL = ModelFacts(moe_layers=[1, 3], num_experts=6, num_null_experts=1, top_k=2, router="top_k")
FACTS = RecordFacts(origin="generate", made_by="a test", model=MODEL, vocab_size=300)
LENGTHS = (5, 1, 4)


def sequences(model: ModelFacts = MODEL) -> list[RoutedSequence]:
    """Return sequences of random tokens; the last token of the last one has no experts."""
    drawn, found = np.random.default_rng(0), []
    for number, length in enumerate(LENGTHS):
        shape = (length - (number == 2), len(model.moe_layers))
        experts = np.argsort(drawn.random((*shape, model.num_choices)))[..., : model.top_k]
        learned = np.arange(length) > 1
        tokens = drawn.integers(0, 300, length)
        found.append(RoutedSequence(tokens=tokens, experts=experts, is_learned=learned, sample_id=10 + number))
    return found


def written(folder: Path, model: ModelFacts = MODEL, facts: RecordFacts = FACTS) -> Path:
    """Write a record of two files and return its folder."""
    writer = RecordWriter(folder, model, vocab_size=facts.vocab_size)
    for number, sequence in enumerate(sequences(model)):
        writer.add(sequence)
        if number == 0:
            writer.flush()
    writer.flush()
    finish_record(folder, facts.model_copy(update={"model": model}))
    return folder


@pytest.mark.parametrize("experts", [5, 300])
def test_a_record_is_read_as_it_was_written(tmp_path: Path, experts: int) -> None:
    model = MODEL.model_copy(update={"num_experts": experts, "top_k": 3})
    record, expected = RoutingRecord(written(tmp_path / "r", model)), sequences(model)
    assert record.num_sequences == len(expected)
    for number, sequence in enumerate(expected):
        found = record.sequence(number)
        assert np.array_equal(found.tokens, sequence.tokens)
        assert np.array_equal(found.experts, sequence.experts)
        assert np.array_equal(found.is_learned, sequence.is_learned)  # type: ignore[arg-type]
        assert found.sample_id == sequence.sample_id
    dtype = load_file(next((tmp_path / "r").glob("*.safetensors")))["expert_ids"].dtype
    assert dtype == (np.uint8 if experts < 255 else np.uint16), "the smallest type"


def _rewritten(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    """Return a function that changes the tensors of the second file and signs the record again."""

    def damage(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[1]
        tensors = {name: array.copy() for name, array in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
        finish_record(folder, FACTS)

    return damage


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        values = json.loads(path.read_text())
        del values["manifest_sha256"]
        change(values)
        path.write_text(json.dumps({**values, "manifest_sha256": hash_of(values)}))

    return damage


def _flip(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])


def _set(name: str, index: Any, value: Any) -> Callable[[Path], object]:
    return _rewritten(lambda tensors: tensors[name].__setitem__(index, value))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed byte": (_flip, r"000001-rank0000\.safetensors: is damaged \(its SHA-256 differs"),
    "a truncated file": (_cut, r"000001-rank0000\.safetensors: is damaged \(\d+ bytes instead of \d+\)"),
    "a missing file": (
        lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
        r"000002-rank0000\.safetensors: is damaged \(No such file",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json, so it is no routing"),
    "no folder": (lambda folder: folder.rename(folder.with_name("else")), "there is no such folder"),
    "a manifest that is no JSON": (lambda f: (f / "manifest.json").write_text("{"), "is damaged .no JSON object"),
    "a changed manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("a test", "a toast")),
        "its hash does not match its content",
    ),
    "another version": (_manifest(lambda v: v.update(format=2)), "of format 2, and this version reads 1"),
    "no files": (_manifest(lambda v: v.update(files={})), r"manifest\.json: files: is empty"),
    "a model of no layers": (_manifest(lambda v: v["model"].update(moe_layers=[])), "model.moe_layers: "),
    "a tensor of another type": (
        _rewritten(lambda t: t.update(expert_ids=t["expert_ids"].astype(np.int32))),
        r"expert_ids is I32 of shape \[5, 2, 2\], not U8 of shape \[5, 2, 2\]",
    ),
    "a tensor of another shape": (
        _rewritten(lambda t: t.update(expert_ids=t["expert_ids"][:, :1].copy())),
        r"expert_ids is U8 of shape \[5, 1, 2\], not U8 of shape \[5, 2, 2\]",
    ),
    "no token ids": (_rewritten(lambda t: t.update(is_learned=t["is_learned"][:2].copy())), "is_learned is BOOL"),
    "starts that do not ascend": (_set("sequence_starts", 1, 5), "sequence_starts does not ascend from 0 to 5"),
    "a missing tensor": (_rewritten(lambda t: t.pop("domain")), "has no domain; a routing record has token_ids"),
    "an expert that does not exist": (
        _set("expert_ids", (2, 1, 0), 7),
        r"000002-rank0000\.safetensors: sequence 1 \(sample_id 12\), token 1, layer 3: expert 7, and there are 7",
    ),
    "an expert twice": (
        _set("expert_ids", 3, 0),
        r"sequence 1 \(sample_id 12\), token 2, layer 1: has an expert twice",
    ),
    "a token without experts": (_set("expert_ids", 2, 255), r"token 1, layer 1: expert 255, and there are 7"),
    "a token that does not exist": (_set("token_ids", 4, 300), r"sequence 1 \(sample_id 12\), token 3: id 300"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_wrong_is_refused_by_its_place(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = written(tmp_path / "r")
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        record = RoutingRecord(folder)
        for number in range(record.num_sequences):
            record.sequence(number)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_scores_may_stand_beside_the_experts(tmp_path: Path) -> None:
    folder = written(tmp_path / "r")
    _rewritten(lambda tensors: tensors.update(scores=np.zeros((5, 2, 2), np.float32)))(folder)
    assert RoutingRecord(folder).num_sequences == len(LENGTHS)


def test_a_killed_recorder_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the manifest, or before a file has its name."""
    for point in ("routing_record.before_manifest", "routing_record.written"):
        monkeypatch.setattr(fault_injection, "_PLANNED", fault_injection.parse_faults(f"{point}=raise", "0"))
        with pytest.raises(RuntimeError, match="planted fault"):
            written(tmp_path / point)
        with pytest.raises(DataError, match=r"has no manifest\.json"):
            RoutingRecord(tmp_path / point)


def test_a_resumed_run_keeps_what_was_recorded_before(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, MODEL, vocab_size=300)
    for step, sequence in zip((2, 4, 6), sequences(), strict=True):
        writer.step = step
        writer.add(replace(sequence, sample_id=step))
        writer.flush()
    finish_record(tmp_path, FACTS)
    (tmp_path / "notes.txt").touch()
    keep_recorded_steps(tmp_path, up_to=4)
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        RoutingRecord(tmp_path)
    finish_record(tmp_path, FACTS)
    assert RoutingRecord(tmp_path).index.sample_id.tolist() == [2, 4]
    assert (tmp_path / "notes.txt").exists()


def test_an_empty_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there was nothing to record"):
        finish_record(tmp_path, FACTS)
