"""Alarms of real trainings that were made ill, by their config or their weights."""

import io
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of, kill_after, train_here
from trainer import fault_injection
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.distributed.signals import StopRequest
from trainer.experiment import ExperimentConfig
from trainer.status import StatusFile
from trainer.training.loop import fit
from trainer.training.run import RunState
from trainer.training.setup import build_run

WITHIN = 100
FEW = ["metrics.log_every=10", "eval.every=null", "eval.max_tokens_per_domain=16", "model.num_layers=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ill")
    words = ["alpha", "beta", "gamma", "delta", "omega", "one", "two", "three", "fox", "dog", "cat", "sun", "moon"]
    text = " ".join(words[i * i % 13] + ("\n\n" if i % 40 == 0 else "") for i in range(2000))
    (place / "text.txt").write_text(text)
    return place


def config_at(place: Path, name: str, *overrides: str) -> ExperimentConfig:
    source = f"data.sources=[{{kind: text, path: {place}/text.txt}}]"
    return config_of(place, source, f"name={name}", *FEW, *overrides)


def train_ill(config: ExperimentConfig, plant: Callable[[RunState], None]) -> str:
    """Train a run whose weights or engine `plant` has made ill; return what was on its screen."""
    folder, screen = RunFolder(Path(config.runs_dir) / config.name), io.StringIO()
    with StopRequest() as stop, closing(Console(config.train.steps, file=screen)) as console:
        run = build_run(config, folder, console, Mesh.of_one(), torch.device("cpu"))
        plant(run)
        fit(run, stop, StatusFile(folder.status, rank=0))
        run.saver.close()
    return screen.getvalue()


def alarms_of(config: ExperimentConfig) -> list[dict[str, Any]]:
    path = Path(config.runs_dir) / config.name / "alarms.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def cures(config: ExperimentConfig) -> dict[str, str]:
    """Return the advice of each alarm that rang within 100 steps."""
    return {line["alarm"]: line["advice"] for line in alarms_of(config) if line["step"] <= WITHIN}


def saturate(run: RunState) -> None:
    """Make the router send every token to expert 1, with certainty."""
    for moe in run.engine.model.moe_layers():
        with torch.no_grad():
            moe.router.gate.bias.fill_(-300.0)[1] = 300.0  # type: ignore[operator, union-attr]


def drift(run: RunState) -> None:
    """Prefer expert 2 a little more in every forward pass."""
    for moe in run.engine.model.moe_layers():
        whole_logits, preference = moe.router.logits, torch.zeros(4)

        def logits(
            tokens: torch.Tensor, whole_logits: Any = whole_logits, preference: torch.Tensor = preference
        ) -> torch.Tensor:
            preference[2] += 0.02
            return whole_logits(tokens) + preference

        moe.router.logits = logits  # type: ignore[assignment]


def test_a_saturated_router_rings_five_alarms_once_whatever_was_resumed(place: Path) -> None:
    router = "model.moe.router={kind: top_k, top_k: 1, normalize: false, gate_bias: true}"
    coefs = ["model.moe.balance.coef=0", "model.moe.z_loss_coef=0"]
    config = config_at(place, "saturated", router, *coefs, "train.steps=80", "checkpoint.every=30")
    screen = train_ill(config, saturate)
    found, lines = cures(config), alarms_of(config)
    assert found.keys() == {"collapse", "alike_tokens", "dead_experts", "entropy_zero", "router_gradient"}
    assert "model.moe.balance.coef=0.01 (now 0)" in found["collapse"]
    assert "schedule.peak_lr=0.0033 (now 0.01)" in found["collapse"]
    assert "surgery prune RUN NAME --keep 1" in found["dead_experts"]
    assert "model.moe.z_loss_coef=0.001 (now 0)" in found["entropy_zero"]
    assert "model.moe.balance.coef=0.01" in found["router_gradient"]
    assert "train.lr_scale={router: 3}" in found["alike_tokens"]
    assert all(screen.count(f"alarm {alarm}: layer 0: ") == 1 for alarm in found) and len(lines) == 5
    folder = Path(config.runs_dir) / config.name
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"]: r["alarms"] for r in records if "alarms" in r} == dict.fromkeys(
        [1, 10, 20, 30, 40, 50], 0
    ) | dict.fromkeys([60, 70, 80], 5)
    for step in (30, 60):  # before the alarms rang, and after
        kill_after(folder, step)
        train_here(config)
        assert alarms_of(config) == lines


def test_a_bias_that_is_too_slow_for_a_drifting_router_is_inert_while_the_imbalance_grows(place: Path) -> None:
    router = "model.moe.router={kind: bias_balanced, top_k: 1, bias_update_rate: 1e-6, normalize: false}"
    config = config_at(place, "drifting", router, "train.steps=100", "checkpoint.every=null")
    screen, found = train_ill(config, drift), cures(config)
    assert {"inert_bias", "imbalance_growth"} <= found.keys()
    assert "model.moe.router.bias_update_rate=0.001 (now 1e-06)" in found["inert_bias"]
    assert "model.moe.router.bias_update_rate=0.001" in found["imbalance_growth"]
    assert "alarm imbalance_growth: layer 0: the busiest expert's load rose from" in screen


def test_a_dense_model_that_learns_nothing_rings_the_plateau_alone_and_null_rings_none(place: Path) -> None:
    flat = [
        "model.moe=null",
        "schedule.peak_lr=1e-9",
        "model.init_std=0.01",
        "checkpoint.every=null",
        "schedule.final_fraction=1",
    ]
    config = config_at(place, "flat", *flat, "train.steps=90")
    train_ill(config, lambda run: None)
    assert cures(config).keys() == {"plateau"} and "schedule.peak_lr=3e-09" in cures(config)["plateau"]
    off = config_at(place, "off", *flat, "train.steps=2", "metrics.alarms=null")
    train_ill(off, lambda run: None)
    folder = Path(off.runs_dir) / "off"
    assert not (folder / "alarms.jsonl").exists() and '"alarms"' not in (folder / "metrics.jsonl").read_text()


def _train_slowed(config: ExperimentConfig, fault: str) -> None:
    """Train on this rank, with 0.25 s more of work in every step where `fault` says so."""
    mesh = mesh_here()
    fault_injection._PLANNED[:] = fault_injection.parse_faults(fault, str(mesh.layout.rank))
    try:
        train_here(config, mesh)
    finally:
        fault_injection._PLANNED.clear()


def test_a_rank_that_works_longer_than_the_others_is_named_and_ranks_that_all_do_are_not(
    place: Path, ranks: Ranks
) -> None:
    # A step takes some milliseconds but for the faults, which are so long that a busy machine does not matter.
    keys = ["train.steps=6", "checkpoint.every=null", "metrics.log_every=2"]
    patience = {"one_slow": 2, "both_slow": 4}  # where nothing is to ring, a busy moment of the machine must not either
    one, both = (
        config_at(place, name, *keys, f"metrics.alarms={{patience: {steps}, slow_rank: 1.5}}")
        for name, steps in patience.items()
    )
    ranks.run(2, _train_slowed, one, "phase.data#2:1=slow")
    ranks.run(2, _train_slowed, both, "phase.data#2=slow")
    [line] = [line for line in alarms_of(one) if line["alarm"] == "slow_rank"]
    assert (line["rank"], line["layer"], line["state"]) == (1, None, "rings") and line["value"] > 1.5
    assert line["message"].startswith("rank 1 is always last: its own work takes")
    assert "profile={start: N, steps: 3, ranks: [1]}" in line["advice"]
    assert alarms_of(both) == []
