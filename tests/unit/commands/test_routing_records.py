"""Tests for the commands that record experts, and those that verify and make records."""

import json
from pathlib import Path

import pytest

from tests.exported_runs import make_run
from trainer.cli import main
from trainer.routing_record.record_reader import RoutingRecord

MODEL = {"num_layers": 2, "d_model": 16, "num_heads": 2, "seq_len": 16, "d_ff": 8, "moe": {"num_experts": 4, "d_ff": 8}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    return make_run(tmp_path_factory.mktemp("run"), MODEL)[1].path


def _said(arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 0) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    said = capsys.readouterr()
    assert exit_.value.code == code, said.err
    return said.out if code == 0 else said.err


def test_generate_records_what_it_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", str(run), "--prompt", "It was", "--max-tokens", "5"]
    plain = _said(options, capsys)
    assert _said([*options, "--record", str(tmp_path / "r")], capsys) == plain
    record = RoutingRecord(tmp_path / "r")
    sequence = record.sequence(0)
    assert record.manifest.origin == "generate" and record.num_sequences == 1
    assert bytes(sequence.tokens[:6].astype("u1")) == b"It was" and sequence.is_learned is not None
    assert sequence.is_learned.tolist() == [False] * 6 + [True] * (len(sequence.tokens) - 6)
    assert _said(["routing", "verify", str(tmp_path / "r")], capsys).endswith("r: 1 sequences, 11 tokens\n")
    said = _said([*options, "--record", str(tmp_path / "r")], capsys, code=2)
    assert "--record: " in said and "is not empty, and a record has a folder of its own" in said


def test_eval_records_held_out_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["eval", str(run), "--json"]
    plain = json.loads(_said(options, capsys))
    assert json.loads(_said([*options, "--record", str(tmp_path / "r")], capsys)) == plain
    record = RoutingRecord(tmp_path / "r")
    assert record.manifest.origin == "eval" and record.manifest.domains == ["prose"]
    text = b"".join(bytes(record.sequence(number).tokens.astype("u1")) for number in range(record.num_sequences))
    assert b"bright cold day" in text
    said = _said([*options, "--record", str(tmp_path / "s"), "--experts-per-token", "1"], capsys, code=2)
    assert "--record: records held-out text; leave out --tasks, --experts-per-token and --lm-eval" in said


def test_engine_outputs_are_imported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"input_ids": [1, 2], "output_ids": [3], "routed_experts": [[[0, 1], [2, 3]], [[1, 0], [3, 2]]]}
    (tmp_path / "out.jsonl").write_text(json.dumps(line))
    options = ["routing", "import", str(run), str(tmp_path / "out.jsonl"), "--to", str(tmp_path / "r")]
    assert _said(options, capsys).endswith("r: 1 sequences, 3 tokens\n")
    (tmp_path / "r/manifest.json").unlink()
    assert "has no manifest.json" in _said(["routing", "verify", str(tmp_path / "r")], capsys, code=3)


def test_a_model_without_a_fixed_k_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense.yaml").write_text("name: d\nmodel: {moe: null}\n")
    options = ["routing", "import", str(tmp_path / "dense.yaml"), "x.jsonl", "--to", str(tmp_path / "r")]
    assert "the model is dense (model.moe: null)" in _said(options, capsys, code=2)
