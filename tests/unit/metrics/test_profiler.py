"""Profiles of training steps, which must not change what is learned."""

import gzip
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ignore_clock import without_clock
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.distributed.signals import StopRequest
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.status import StatusFile
from trainer.trackers.jsonl import read_jsonl
from trainer.training.loop import fit
from trainer.training.setup import build_run

CONFIG = """\
name: tiny
model: {num_layers: 2, d_model: 16, num_heads: 2, seq_len: 8, d_ff: 8, moe: {num_experts: 4, d_ff: 8}}
train: {steps: 6, global_batch_size: 4}
schedule: {kind: warmup_cosine, warmup_steps: 0}
eval: {max_tokens_per_domain: 64}
checkpoint: {every: null}
metrics: {log_every: 1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 50)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def train(folder: Path, overrides: Sequence[str], mesh: Mesh | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Train; return the weights and the console messages on the profile."""
    mesh, screen = mesh or Mesh.of_one(), io.StringIO()
    places = [f"data.sources=[{{kind: text, path: {folder}/text.txt}}]", f"data.cache_dir={folder}/cache"]
    config = load(folder / "tiny.yaml", [*places, f"runs_dir={folder}/runs", *overrides], ExperimentConfig)
    where = RunFolder(folder / "runs" / config.name)
    run = build_run(config, where, Console(config.train.steps, file=screen), mesh, torch.device("cpu"))
    fit(run, StopRequest(), StatusFile(where.status, rank=mesh.layout.rank))
    run.saver.close()
    weights = {name: part.tensor.detach().clone() for name, part in run.engine.state().slices.items()}
    return weights, [line for line in screen.getvalue().splitlines() if "profile of" in line]


def trace(folder: Path, name: str) -> dict[str, int]:
    """Return the number of occurrences of each part in a trace."""
    with gzip.open(folder / "runs/tiny/profile" / name) as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_a_run_under_the_profiler_learns_the_same_bit_for_bit(folder: Path):
    plain, _ = train(folder, ["name=plain"])
    watched, said = train(folder, ["profile={start: 3, steps: 2, memory: true, shapes: true, stacks: true}"])
    assert all(torch.equal(watched[name], plain[name]) for name in plain)
    mine, oracle = (map(without_clock, read_jsonl(folder / f"runs/{name}/metrics.jsonl")) for name in ("tiny", "plain"))
    assert list(mine) == list(oracle)
    assert said == [f"profile of rank 0: {folder}/runs/tiny/profile/steps_00000003-00000004_rank00000.json.gz"]
    parts = trace(folder, "steps_00000003-00000004_rank00000.json.gz")
    assert parts["data"] == parts["backward"] == 2
    assert parts["dispatch"] == parts["experts"] == parts["combine"] == 4  # of two layers, in two steps
    tables = (folder / "runs/tiny/profile/steps_00000003-00000004_rank00000.txt").read_text()
    assert "Self CPU Mem" in tables and "Input Shapes" in tables


@pytest.mark.nightly
def test_a_repeated_window_does_not_replace_earlier_profiles(folder: Path):
    window = "profile={start: 5, steps: 2}"
    train(folder, [window])
    (folder / "runs/tiny/run_id").unlink()
    for path in (folder / "runs/tiny/checkpoints").iterdir():
        path.rename(folder / path.name)  # and so the run begins anew
    train(folder, [window])
    assert sorted(path.name for path in (folder / "runs/tiny/profile").glob("*.gz")) == [
        "steps_00000005-00000006_rank00000.json.gz",
        "steps_00000005-00000006_rank00000_2.json.gz",
    ]


def test_a_run_resumed_within_the_window_profiles_the_rest_of_it(folder: Path):
    train(folder, ["train.steps=3", "profile=null"])
    _, said = train(folder, ["profile={start: 2, steps: 4}"])
    assert said[0].endswith("steps_00000004-00000005_rank00000.json.gz")
    assert trace(folder, "steps_00000004-00000005_rank00000.json.gz")["backward"] == 2


def test_what_cannot_be_written_is_a_warning(folder: Path):
    (folder / "runs/tiny").mkdir(parents=True)
    (folder / "runs/tiny/profile").write_text("")
    _, said = train(folder, ["profile={start: 1, steps: 1}"])
    (line,) = said
    assert line.startswith("warning: profile of rank 0: [Errno 17] File exists: ") and line.endswith(
        "training continues"
    )


def _on_a_rank(folder: Path) -> list[str]:
    _, said = train(folder, ["parallel.ep_size=2", "profile={start: 2, steps: 1, ranks: [1]}"], mesh_here(ep_size=2))
    return said


def test_only_the_configured_ranks_are_profiled(folder: Path, ranks: Ranks):
    said, _ = ranks.run(2, _on_a_rank, folder)
    assert said == [f"profile of rank 1: {folder}/runs/tiny/profile/steps_00000002-00000002_rank00001.json.gz"]
    parts = trace(folder, "steps_00000002-00000002_rank00001.json.gz")
    assert parts["communication"] > 0 and parts["data"] == 1


def test_a_rank_that_does_not_exist_is_rejected(folder: Path):
    with pytest.raises(ConfigError) as error:
        train(folder, ["profile={start: 1, steps: 1, ranks: [0, 2]}"])
    assert str(error.value) == "profile.ranks: there is no rank 2 among 1; use 0 to 0"
