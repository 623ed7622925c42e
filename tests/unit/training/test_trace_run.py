"""Tests for `trace`: what is recorded is what the model did, by the number, and damage is noticed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exported_runs import TEXT, make_run
from trainer.cli import main
from trainer.errors import DataError
from trainer.routing_record.record_reader import RoutingRecord

MOE = {"num_experts": 6, "d_ff": 8}


def _model(router: dict[str, Any]) -> dict[str, Any]:
    moe = {**MOE, "router": router, "balance": {"coef": 0.01 if router["kind"] == "top_k" else 0.0}}
    return {"num_layers": 2, "d_model": 16, "num_heads": 2, "seq_len": 16, "d_ff": 8, "moe": moe}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a ranking router."""
    return make_run(tmp_path_factory.mktemp("run"), _model({"kind": "top_k", "top_k": 2}))[1].path


@pytest.fixture(scope="module")
def traced(run: Path) -> Path:
    """The folder of its trace."""
    called(["trace", str(run), "--to", str(run.parent / "t")])
    return run.parent / "t"


def called(arguments: list[str], code: int = 0) -> None:
    """Run a command, which ends with a code."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == code


def test_a_trace_has_the_experts_of_an_evaluation_and_their_scores(run: Path, traced: Path, tmp_path: Path) -> None:
    called(["eval", str(run), "--record", str(tmp_path / "r"), "eval.max_tokens_per_domain=null"])
    plain, record = RoutingRecord(tmp_path / "r"), RoutingRecord(traced)
    facts = record.manifest.trace
    assert facts is not None and (facts.num_ranked, facts.largest_top_k, facts.row_length) == (4, 4, 16)
    assert record.num_sequences == plain.num_sequences > 3
    for number in range(record.num_sequences):
        found, expected = record.sequence(number), plain.sequence(number)
        assert np.array_equal(found.tokens, expected.tokens) and np.array_equal(found.experts, expected.experts)
        scores = found.traced["scores"]
        assert scores.dtype == np.float32 and (np.diff(scores, axis=-1) <= 0).all(), "best first"
        assert (scores.sum(-1) < 1).all() and (scores.sum(-1) > 4 / 6).all(), "the best four of six"
        assert expected.is_learned is not None
        assert np.array_equal(found.traced["is_counted"][:-1], expected.is_learned[1:])
    entry = next(iter(record.manifest.files.values()))
    per_token = 1 + 1 + 1 + 2 * 4 * (1 + 4)  # of token, learned, counted; of two layers' four experts and scores
    per_sequence = 3 * 8
    assert 0 < entry.size_bytes - entry.num_tokens * per_token - entry.num_sequences * per_sequence < 1500, "a header"


def test_a_router_that_does_not_rank_has_its_choices_and_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, _model({"kind": "hash", "top_k": 2}))[1].path
    called(["trace", str(run), "--to", str(tmp_path / "t"), "--max-tokens", "32"])
    record = RoutingRecord(tmp_path / "t")
    sequence, facts = record.sequence(0), record.manifest.trace
    assert facts is not None and facts.num_ranked == 0 and record.num_sequences == 2
    assert np.array_equal(sequence.traced["combine_weights"], np.full((16, 2, 2), 0.5, np.float32))
    called(["trace", str(run), "--to", str(tmp_path / "u"), "--choices", "3"], code=2)
    assert "--choices: hash does not rank experts by scores of its own" in capsys.readouterr().err


def test_a_router_without_a_fixed_k_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, _model({"kind": "expert_choice"}))[1].path
    called(["trace", str(run), "--to", str(tmp_path / "t")], code=2)
    assert "and expert_choice gives tokens different numbers; trace a run whose router has a fixed k" in (
        capsys.readouterr().err
    )


def test_training_text_is_traced_too(run: Path, tmp_path: Path, traced: Path) -> None:
    called(["trace", str(run), "--to", str(tmp_path / "t"), "--split", "train", "--choices", "2"])
    record, held_out = RoutingRecord(tmp_path / "t"), RoutingRecord(traced)
    assert record.manifest.trace is not None and record.manifest.trace.split == "train"
    assert record.sequence(0).traced["further_experts"].shape == (16, 2, 0)
    lengths = int(record.lengths().sum()), int(held_out.lengths().sum())
    assert lengths[0] > 5 * lengths[1] and abs(sum(lengths) - len(TEXT)) <= 4, "the other part of the text"


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_flipped_byte_is_noticed(traced: Path, place: float, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(traced.glob("*.safetensors"))
    content = path.read_bytes()
    changed = bytearray(content)
    changed[int(len(content) * place)] ^= 16
    path.write_bytes(changed)
    try:
        called(["routing", "verify", str(traced)], code=3)
        assert "is damaged (its SHA-256 differs" in capsys.readouterr().err
    finally:
        path.write_bytes(content)
    called(["routing", "verify", str(traced)])
    with pytest.raises(DataError, match="there is no such folder"):
        RoutingRecord(traced / "elsewhere")
