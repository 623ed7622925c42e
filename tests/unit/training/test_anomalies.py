"""Tests for numerical anomalies: what a run warns about, counts, skips, saves and resumes."""

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.distributed.signals import StopRequest
from trainer.errors import DivergedError, NumericsError
from trainer.experiment import ExperimentConfig
from trainer.status import StatusFile
from trainer.trackers.jsonl import read_jsonl
from trainer.training.loop import fit
from trainer.training.run import RunState
from trainer.training.setup import build_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    return tmp_path


def _config(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> ExperimentConfig:
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 1,
            "d_model": 16,
            "num_heads": 2,
            "seq_len": 8,
            "moe": {"num_experts": 4, "d_ff": 12, "router": {"kind": "bias_balanced"}},
        },
        "data": {
            "sources": [{"kind": "text", "path": str(folder / "text.txt"), "domain": "prose"}],
            "cache_dir": str(folder / "cache"),
        },
        "schedule": {"kind": "warmup_cosine", "peak_lr": 1e-4, "warmup_steps": 0},
        "train": {"steps": 10, "global_batch_size": 4},
        "eval": {"every": None, "max_tokens_per_domain": 16},
        "parallel": {"micro_batch_size": 4},
        "checkpoint": {"every": None},
        "metrics": {"log_every": 1, "alarms": None},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    return ExperimentConfig.model_validate({"name": "tiny", "runs_dir": str(folder / "runs"), **sections})


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of a run on one rank."""

    said: list[str]
    """Warnings."""
    error: str | None
    window: dict[str, Any]
    weights: dict[str, torch.Tensor]
    skipped_in_a_row: int


def _run(
    folder: Path,
    changes: Mapping[str, Mapping[str, Any]],
    *,
    mesh: Mesh | None = None,
    factors: Mapping[int, float] | None = None,
    before: Callable[[RunState, int], None] | None = None,
) -> Report:
    """Train, with the loss of step s multiplied by factors[s]; call `before` with the number of each step."""
    mesh, screen = mesh or Mesh.of_one(), io.StringIO()
    config = _config(folder, changes)
    where = RunFolder(folder / "runs/tiny")
    run = build_run(config, where, Console(config.train.steps, file=screen), mesh, torch.device("cpu"))
    whole_step, whole_losses, step = run.engine.train_step, run.engine.model.losses, run.start_step

    def losses(*args: Any) -> Any:
        row_loss, *others = whole_losses(*args)
        return row_loss * (factors or {}).get(step, 1.0), *others

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        if before is not None:
            before(run, step)
        run.engine.model.losses = losses  # type: ignore[method-assign]
        try:
            return whole_step(*args, **kwargs)
        finally:
            del run.engine.model.__dict__["losses"]

    run.engine.train_step = train_step  # type: ignore[method-assign]
    error = None
    try:
        fit(run, StopRequest(), StatusFile(where.status, rank=mesh.layout.rank))
    except (NumericsError, DivergedError) as caught:
        error = str(caught)
    except KeyError as caught:  # how a test ends a run from outside
        assert caught.args == ("killed",)
    return Report(
        said=[line.removeprefix("warning: ") for line in screen.getvalue().splitlines() if line.startswith("warning")],
        error=error,
        window=run.spikes.record(),
        weights={name: part.tensor.detach().clone() for name, part in run.engine.state().slices.items()},
        skipped_in_a_row=run.skipped_in_a_row,
    )


def _records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(folder / "runs/tiny/metrics.jsonl") if "loss" in record]


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs/tiny/checkpoints").glob("step_*"))


# --- steps that are not finite ----------------------------------------------------------------------------------------


def _on_a_rank(
    folder: Path,
    changes: Mapping[str, Mapping[str, Any]],
    victim: int,
    factors: Mapping[int, float],
    flip_at: int | None = None,
) -> Report:
    """Call `_run` on a rank; the victim gets the factors and, before step `flip_at`, a flipped bit in the router."""
    mesh = mesh_here()

    def flip(run: RunState, step: int) -> None:
        if step == flip_at and mesh.layout.rank == victim:
            run.engine.model.get_parameter("blocks.0.ffn.router.gate.weight").data.view(torch.int32)[1, 2] ^= 1 << 20

    return _run(folder, changes, mesh=mesh, factors=factors if mesh.layout.rank == victim else None, before=flip)


def test_a_skipped_step_is_reported_and_counted(ranks: Ranks, folder: Path) -> None:
    first, second = ranks.run(2, _on_a_rank, folder, {}, 1, {3: math.nan, 5: math.inf})
    why = "the gradient of embedding.weight and 9 more parameters is not finite (loss not finite on rank 1)"
    assert first.said == [f"step 3 skipped: {why}", f"step 5 skipped: {why}"]
    assert first.error is None and first.skipped_in_a_row == second.skipped_in_a_row == 0
    records = _records(folder)
    assert [r["skipped_steps"] for r in records] == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [r["loss"] is None for r in records] == [r["step"] in (3, 5) for r in records]
    assert all(torch.equal(x, second.weights[name]) and x.isfinite().all() for name, x in first.weights.items())


def test_a_run_that_stays_non_finite_ends_with_the_reason(ranks: Ranks, folder: Path) -> None:
    changes = {"train": {"max_consecutive_skips": 3, "steps": 10, "global_batch_size": 4}}
    reports = ranks.run(2, _on_a_rank, folder, changes, 1, dict.fromkeys([2, 4, 5, 6, 7], math.nan))
    for report in reports:
        assert report.error == (
            "step 6: 3 steps in a row are not finite, the last one because the gradient of embedding.weight and 9 more "
            "parameters is not finite (loss not finite on rank 1); the weights are those of step 3: lower "
            "schedule.peak_lr, or resume from an earlier checkpoint"
        )
    assert [line[:14] for line in reports[0].said] == [f"step {step} skipped" for step in (2, 4, 5, 6)]
    assert _saved(folder) == []


# --- states that are not finite ---------------------------------------------------------------------------------------

W_IN, GATE = "blocks.0.ffn.experts.w_in", "blocks.0.ffn.router.gate.weight"
ZERO = {"engine": {"kind": "deepspeed", "zero_stage": 2}}
OF_GATE = f"optim.exp_avg_sq.{GATE}"
SPOILED = {
    "weights of an expert": ({"parallel": {"ep_size": 2}}, f"model.{W_IN}", [1], f"model.{W_IN} (expert 2 and 1 more)"),
    "weights on all ranks": ({}, f"model.{GATE}", [0, 1], f"model.{GATE}"),
    "a moment that spoils its weights": ({}, f"optim.exp_avg.{GATE}", [0, 1], f"model.{GATE}"),
    "a moment in shards": ({"parallel": {"data": "shard"}}, OF_GATE, [1], OF_GATE),
    "a moment of ZeRO": (ZERO, "optim.exp_avg_sq.embedding.weight", [1], "optim.exp_avg_sq.embedding.weight"),
    "a router's bias": ({}, "model.blocks.0.ffn.router.bias", [0, 1], "model.blocks.0.ffn.router.bias"),
}  # fmt: skip


def _spoiled(folder: Path, changes: Mapping[str, Mapping[str, Any]], name: str, victims: list[int]) -> Report:
    """Call `_run` on a rank, saving every two steps; before step 4 a tensor of the victims becomes non-finite."""
    mesh = mesh_here(ep_size=changes.get("parallel", {}).get("ep_size", 1))

    def spoil(run: RunState, step: int) -> None:
        state = run.engine.state()  # on every rank: an engine may have to ask the others
        if step == 4 and mesh.layout.rank in victims:
            state.slices[name].tensor.fill_(math.inf)

    return _run(folder, {**changes, "checkpoint": {"every": 2}}, mesh=mesh, before=spoil)


@pytest.mark.parametrize("case", SPOILED)
def test_a_non_finite_state_ends_the_run_on_all_ranks_and_is_not_saved(ranks: Ranks, folder: Path, case: str) -> None:
    changes, name, victims, named = SPOILED[case]
    errors = [report.error for report in ranks.run(2, _spoiled, folder, changes, name, victims)]
    assert errors[0] is not None and errors[0] == errors[1]
    where = "1" if victims == [1] else "[01]"
    assert re.match(
        rf"step 4: {re.escape(named)} is not finite on rank {where}( \(and \d+ more tensors?\))?; ", errors[0]
    )
    good = folder / "runs/tiny/checkpoints/step_00000002"
    advice = f"the last good checkpoint is {good}: lower schedule.peak_lr and start again to resume from it"
    assert errors[0].endswith(f"; nothing of it is saved; {advice}")
    assert _saved(folder) == [good.name]


def test_non_finite_weights_are_named(folder: Path) -> None:
    def spoil(run: RunState, step: int) -> None:
        if step == 3:
            run.engine.model.get_parameter(GATE).data[1, 2] = math.nan

    changes = {"train": {"max_consecutive_skips": 2, "steps": 10, "global_batch_size": 4}}
    report = _run(folder, changes, before=spoil)
    assert report.error is not None and report.error.startswith(f"step 4: model.{GATE} is not finite; nothing of it")


# --- copies that part -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "save_every", "found_at"), [(4, None, 8), (1, None, 6), (None, 7, 7), (None, None, 10)]
)
def test_a_flipped_bit_is_detected_at_the_next_check_and_never_saved(
    ranks: Ranks, folder: Path, every: int | None, save_every: int | None, found_at: int
) -> None:
    changes = {"parallel": {"check_copies_every": every}, "checkpoint": {"every": save_every}}
    equal_at = {4: 4, 1: 5}.get(every or 0, 0)
    for report in ranks.run(2, _on_a_rank, folder, changes, 1, {}, 6):
        assert report.error is not None
        assert report.error.startswith(f"step {found_at}: ranks 0 and 1 hold different copies of ")
        assert "blocks.0.ffn.router.gate.weight" in report.error
        assert f"; all copies were equal at step {equal_at}. Nothing has been saved since: " in report.error
    assert _saved(folder) == []


def test_a_run_without_a_flipped_bit_passes_the_check_and_saves(ranks: Ranks, folder: Path) -> None:
    changes = {"parallel": {"check_copies_every": 1}, "checkpoint": {"every": 5}}
    assert [report.error for report in ranks.run(2, _on_a_rank, folder, changes, 1, {})] == [None, None]
    assert _saved(folder) == ["step_00000005", "step_00000010"]


def test_a_replica_that_makes_steps_non_finite_is_named(ranks: Ranks, folder: Path) -> None:
    changes = {"train": {"max_consecutive_skips": 2, "steps": 10, "global_batch_size": 4}}
    reports = ranks.run(2, _on_a_rank, folder, changes, 0, {6: math.nan, 7: math.nan}, 6)
    assert all(r.error is not None and r.error.startswith("step 7: ranks 0 and 1 hold different") for r in reports)


# --- loss spikes ------------------------------------------------------------------------------------------------------


def _spikes(**fields: Any) -> dict[str, dict[str, Any]]:
    skips = fields.pop("max_consecutive_skips", 5)
    steps = fields.pop("steps", 60)
    train = {"steps": steps, "global_batch_size": 4, "spikes": fields, "max_consecutive_skips": skips}
    return {"train": train}


def test_a_spike_is_reported_and_counted_and_taken(folder: Path) -> None:
    report = _run(folder, _spikes(), factors={40: 3.0, 20: 3.0})
    assert len(report.said) == 1, "at step 20 there was too little to judge by"
    assert report.said[0].startswith("step 40: loss ")
    assert "is a spike (above " in report.said[0] and "over the mean of 39 losses)" in report.said[0]
    assert report.said[0].endswith("; the step was taken, as train.spikes.skip is false")
    assert [r["loss_spikes"] for r in _records(folder)] == [int(step >= 40) for step in range(1, 61)]
    assert {r["skipped_steps"] for r in _records(folder)} == {0}
    assert report.window["losses"] == [r["loss"] for r in _records(folder)], "each loss, to its last bit"


def test_a_spike_is_skipped_on_all_ranks_and_stays_out_of_the_window(ranks: Ranks, folder: Path) -> None:
    first, second = ranks.run(2, _on_a_rank, folder, _spikes(skip=True, steps=42), 1, {40: 5.0, 41: math.nan})
    assert first.said[0].startswith("step 40 skipped: loss ") and "is a spike (above " in first.said[0]
    assert first.said[1].startswith("step 41 skipped: the gradient of ") and len(first.said) == 2
    records = _records(folder)
    assert [(r["skipped_steps"], r["loss_spikes"]) for r in records[38:]] == [(0, 0), (1, 1), (2, 1), (2, 1)]
    assert first.window == second.window
    assert first.window["losses"] == [r["loss"] for r in records if r["step"] not in (40, 41)]
    assert all(torch.equal(x, second.weights[name]) for name, x in first.weights.items())


def test_a_loss_that_stays_high_is_taken_after_a_few_skipped_steps(folder: Path) -> None:
    changes = _spikes(skip=True, max_consecutive_skips=3, steps=80)
    report = _run(folder, changes, factors=dict.fromkeys(range(41, 81), 3.0))
    assert report.error is None
    assert [line[:15] for line in report.said] == [f"step {step} skipped" for step in (41, 42, 43)]
    assert report.said[-1].endswith(", number 3 in a row: the spike window restarts from here")
    assert _records(folder)[-1]["skipped_steps"] == 3
    assert len(report.window["losses"]) == 80 - 43 and report.window["skipped_in_a_row"] == 0


def test_spikes_between_non_finite_steps_do_not_postpone_the_end(folder: Path) -> None:
    changes = _spikes(skip=True, max_consecutive_skips=3)
    report = _run(folder, changes, factors={40: math.nan, 41: 3.0, 42: math.nan, 43: 3.0, 44: math.nan})
    assert report.error is not None and "step 44: 3 steps in a row are not finite" in report.error
    assert "the weights are those of step 39" in report.error


def test_without_sigmas_no_loss_is_a_spike(folder: Path) -> None:
    report = _run(folder, _spikes(sigmas=None), factors={40: 100.0})
    assert report.said == [] and report.window == {"losses": [], "count": 0, "skipped_in_a_row": 0}


@pytest.mark.parametrize("forgets", [False, True])
def test_a_resumed_run_keeps_the_spike_window(folder: Path, forgets: bool, tmp_path: Path) -> None:
    """Control: a run that forgets its window does not."""
    factors = {38: 3.0, 41: 2.0, 43: 1.5, 45: 1.2, 47: 1.1, 55: 1.05, 57: 3.0}
    changes = {**_spikes(skip=True, window=48, sigmas=3.0), "checkpoint": {"every": 40, "asynchronous": False}}
    whole = _run(folder, changes, factors=factors)
    records = _records(folder)
    (folder / "runs").rename(folder / "whole")

    def killed_at_44(run: RunState, step: int) -> None:
        if step == 44:
            raise KeyError("killed")

    _run(folder, changes, factors=factors, before=killed_at_44)
    assert _saved(folder) == ["step_00000040"]
    forget: Callable[[RunState, int], None] = lambda run, step: run.spikes.restore({}) if step == 41 else None  # noqa: E731
    resumed = _run(folder, changes, factors=factors, before=forget if forgets else None)
    is_same = (
        [(r["loss"], r["skipped_steps"], r["loss_spikes"]) for r in _records(folder)]
        == [(r["loss"], r["skipped_steps"], r["loss_spikes"]) for r in records]
        and resumed.window == whole.window
        and all(torch.equal(x, resumed.weights[name]) for name, x in whole.weights.items())
    )
    assert is_same != forgets
    assert records[-1]["loss_spikes"] >= 4


def test_a_checkpoint_without_a_window_starts_an_empty_one(folder: Path) -> None:
    changes = {**_spikes(steps=40), "checkpoint": {"every": 40, "asynchronous": False}}
    _run(folder, changes)
    where = RunFolder(folder / "runs/tiny")
    config = _config(folder, changes)
    run = build_run(config, where, Console(0, file=io.StringIO()), Mesh.of_one(), torch.device("cpu"))
    assert len(run.spikes.losses) == 40
    assert json.loads(json.dumps(run.checkpoint_info()))["spikes"] == run.spikes.record()
    run.spikes.restore({})
    assert run.spikes.record() == {"losses": [], "count": 0, "skipped_in_a_row": 0}
