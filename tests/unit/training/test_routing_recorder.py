"""Tests for recording a training run's experts and replaying them: the same bits, and mismatches refused by place."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.distributed.signals import StopRequest
from trainer.errors import ConfigError, DataError, ResourceError
from trainer.experiment import ExperimentConfig
from trainer.routing_record.record_reader import RoutingRecord
from trainer.status import StatusFile
from trainer.trackers.jsonl import read_jsonl
from trainer.training.loop import fit
from trainer.training.run import RunState
from trainer.training.setup import build_run

CONFIG = """\
name: a
model:
  {num_layers: 2, d_model: 16, num_heads: 2, seq_len: 8, d_ff: 8, document_mask: true,
   moe: {num_experts: 3, d_ff: 8, router: {kind: bias_balanced, jitter: 0.2}, capacity: {factor: 0.8}}}
data: {packing: bfd}
train: {steps: 4, global_batch_size: 5, dtype: float64}
schedule: {kind: warmup_cosine, warmup_steps: 0}
eval: {every: null, max_tokens_per_domain: 16}
checkpoint: {every: 2}
metrics: {log_every: 1}
"""
RECORD, REPLAY = "metrics.routing_record={}", "train.routing_replay={path: runs/a/routing_record}"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, texts, and a run that recorded every step on one rank."""
    folder = tmp_path_factory.mktemp("recorded")
    lines = [f"It was the {number}th bright cold day. " for number in range(60)]
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    (folder / "other.jsonl").write_text("".join(f'{{"text": "{line.lower()}"}}\n' for line in lines))
    (folder / "tiny.yaml").write_text(CONFIG)
    _run(folder, RECORD)
    return folder


def _run(folder: Path, *changes: str, mesh: Mesh | None = None) -> RunState:
    """Train a run of the folder to its end."""
    mesh = mesh or Mesh.of_one()
    places = [f"data.sources=[{{kind: jsonl, path: {folder}/text.jsonl}}]", f"data.cache_dir={folder}/cache"]
    changes = tuple(change.replace("runs/", f"{folder}/runs/") for change in changes)
    config = load(folder / "tiny.yaml", [*places, f"runs_dir={folder}/runs", *changes], ExperimentConfig)
    where = RunFolder(folder / "runs" / config.name)
    run = build_run(config, where, Console(4, file=io.StringIO()), mesh, torch.device("cpu"))
    fit(run, StopRequest(), StatusFile(where.status, rank=mesh.layout.rank))
    run.saver.close()
    return run


def _state(run: RunState) -> dict[str, Tensor]:
    return {name: part.tensor for name, part in run.engine.state().slices.items()}


def _losses(folder: Path, name: str) -> list[Any]:
    records = read_jsonl(folder / "runs" / name / "metrics.jsonl")
    keys = ("step", "loss", "balance_loss", "grad_norm", "drop_rate", "load_imbalance")
    return [[record[key] for key in keys] for record in records if "loss" in record]


def _same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def test_a_replayed_run_is_the_recorded_one_bit_for_bit(recorded: Path) -> None:
    """The record holds the choices before drops; without it, other weights would choose otherwise."""
    _run(recorded, "name=b", REPLAY)
    assert _losses(recorded, "b") == _losses(recorded, "a")
    found = [record for record in read_jsonl(recorded / "runs/b/metrics.jsonl") if "loss" in record]
    for key in ("other_experts", "other_tokens", "other_somewhere", "missed_mass"):
        assert [record[f"replay_{key}"] for record in found] == [0.0] * 4
    assert all("replay" in record for record in read_jsonl(recorded / "runs/b/routing.jsonl"))
    # From other weights, the same experts of the same tokens: now the router disagrees.
    _run(recorded, "name=c", REPLAY, "model.init_std=0.5")
    found = [record for record in read_jsonl(recorded / "runs/c/metrics.jsonl") if "loss" in record]
    assert all(0 < record["replay_other_experts"] <= record["replay_other_tokens"] for record in found)
    assert all(record["replay_other_tokens"] <= record["replay_other_somewhere"] <= 1 for record in found)
    counts = [[r["counts"] for r in read_jsonl(recorded / f"runs/{name}/routing.jsonl")] for name in "ac"]
    assert counts[0] == counts[1], "the counts are those of the given experts"


def test_a_run_that_is_resumed_records_each_row_once(recorded: Path) -> None:
    folder = recorded / "runs/a"
    shutil.copytree(folder, recorded / "runs/d")
    shutil.rmtree(recorded / "runs/d/checkpoints/step_00000004")
    again = _run(recorded, "name=d", RECORD)
    assert again.start_step == 2
    records = [RoutingRecord(recorded / f"runs/{name}/routing_record") for name in "ad"]
    for number in range(records[0].num_sequences):
        mine, theirs = (record.sequence(number) for record in records)
        assert mine.sample_id == theirs.sample_id and (mine.experts == theirs.experts).all()
    # A replay resumes too.
    shutil.copytree(folder, recorded / "runs/e")
    shutil.rmtree(recorded / "runs/e/checkpoints/step_00000004")
    _same(_state(_run(recorded, "name=e", REPLAY)), _state(again))


def test_the_record_of_another_run_is_never_changed(recorded: Path) -> None:
    """Neither by a run that names its folder, nor by a branch that names the folder of its parent."""
    folder, place = recorded / "runs/a/routing_record", "metrics.routing_record={path: runs/a/routing_record}"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"routing_record is the record of another run \('[0-9a-f]+'\), which recor"):
        _run(recorded, "name=j", place)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    of_others = recorded / "of_others"
    of_others.mkdir()
    (of_others / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="of_others has files of others"):
        _run(recorded, "name=k", f"metrics.routing_record={{path: {of_others}}}")
    with pytest.raises(ResourceError, match="cannot be written"):
        _run(recorded, "name=l", f"metrics.routing_record={{path: {recorded}/text.jsonl/x}}")
    own = f"metrics.routing_record={{path: {recorded}/own}}"
    _run(recorded, "name=m", own, "train.steps=2")
    assert _run(recorded, "name=m", own).start_step == 2, "it goes on in its own"
    assert RoutingRecord(recorded / "own").num_sequences == 20


def _on_ranks(folder: Path) -> None:
    layout = ("parallel.ep_size=2", "parallel.micro_batch_size=2", "eval.max_tokens_per_domain=1")
    states = []
    for name, key in (("live", RECORD), ("replay", REPLAY)):
        states.append(_state(_run(folder, f"name={name}", key, *layout, mesh=mesh_here(ep_size=2))))
    _same(states[1], states[0])


def test_a_record_of_one_rank_is_replayed_on_several_and_the_reverse(recorded: Path, ranks: Ranks) -> None:
    """Three experts on two ranks are uneven; each rank records its rows, and the rows are those of one rank."""
    ranks.run(2, _on_ranks, recorded)
    whole, parts = (RoutingRecord(recorded / f"runs/{name}/routing_record") for name in ("a", "live"))
    assert sorted(parts.index.sample_id) == sorted(whole.index.sample_id) == list(range(20))
    by_row = {int(sample): number for number, sample in enumerate(parts.index.sample_id)}
    for number, sample in enumerate(whole.index.sample_id):
        mine, theirs = parts.sequence(by_row[int(sample)]), whole.sequence(number)
        assert (mine.tokens == theirs.tokens).all() and (mine.experts == theirs.experts).all()


MISMATCHES = {
    "another seed": (["seed=1"], "was recorded with seed 1337, and this run has 1, so its rows are others"),
    "other rows": (["model.seq_len=12"], "was recorded with seq_len 8, and this run has 12"),
    "another packing": (["data.packing=wrapped"], "was recorded with packing bfd, and this run has wrapped"),
    "another text": (
        ["data.sources=[{kind: jsonl, path: runs/../other.jsonl}]"],
        "was recorded with data_fingerprint [0-9a-f]{12}, and this run has [0-9a-f]{12}",
    ),
    "other layers": (["model.num_layers=3"], r"has the MoE layers \[0, 1\], and this model \[0, 1, 2\]"),
    "other experts": (["model.moe.num_experts=4"], "has num_experts 3, and this model 4"),
    "another k": (["model.moe.router.top_k=3"], "has top_k 2, and this model 3"),
    "null experts": (["model.moe.router.null_experts=1"], "has null_experts 0, and this model 1"),
    "another router": (
        ["model.moe.router={kind: top_k}"],
        "was chosen by the router bias_balanced, and this model has top_k",
    ),
    "rows that were not recorded": (["train.steps=5"], "row 20 is not recorded, only 20 rows from 0 to 19"),
}


@pytest.mark.parametrize(("changes", "message"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_a_record_of_something_else_is_refused(recorded: Path, changes: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _run(recorded, "name=x", REPLAY, *changes)
    shutil.rmtree(recorded / "runs/x", ignore_errors=True)


def test_a_record_of_some_steps_is_refused_where_the_first_is_missing(recorded: Path) -> None:
    _run(recorded, "name=f", "metrics.routing_record={every: 2}")
    assert RoutingRecord(recorded / "runs/f/routing_record").num_sequences == 10
    with pytest.raises(DataError, match=r"row 0 is not recorded, only 10 rows from 5 to 19, of every 2\. step"):
        _run(recorded, "name=g", "train.routing_replay={path: runs/f/routing_record}")


def test_sequences_of_a_record_are_rows_too(recorded: Path) -> None:
    """Without `data`: each sequence is in one row, and its tokens have the experts that were recorded."""
    run = _run(recorded, "name=h", REPLAY.replace("}", ", rows: sequences}"), "train.steps=3")
    record = RoutingRecord(recorded / "runs/a/routing_record")
    batch = run.stream.rows(0, run.stream.domain_rows[0].num_rows)
    assert batch.experts is not None
    seen = 0
    for number in range(record.num_sequences):
        sequence = record.sequence(number)
        here = (batch.document_id == number) & batch.valid
        if len(sequence.tokens) == 1:
            assert not here.any()
            continue
        assert here.any(dim=1).sum() == 1
        assert batch.tokens[here].tolist() == sequence.tokens[:-1].tolist()
        assert batch.targets[here].tolist() == sequence.tokens[1:].tolist()
        assert (batch.experts[here].numpy() == sequence.experts[:-1]).all()
        assert sequence.is_learned is not None
        assert batch.loss_mask[here].tolist() == sequence.is_learned[1:].tolist()
        seen += int(here.sum())
    assert seen == int(batch.valid.sum()) > 0
    with pytest.raises(DataError, match=r"sequence \d+ \(sample_id \d+\): has 8 tokens, and a row of model.seq_len 6"):
        _run(recorded, "name=i", REPLAY.replace("}", ", rows: sequences}"), "model.seq_len=6")
