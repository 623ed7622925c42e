"""Tests for the training loop: inputs of each step, and its record in metrics.jsonl."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.tiny import make_workplace
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.data.batches.batch import Batch
from trainer.data.batches.copy_ahead import CopyAhead
from trainer.distributed.mesh import Mesh
from trainer.distributed.signals import StopRequest
from trainer.experiment import ExperimentConfig
from trainer.metrics.device_waits import DeviceWaits
from trainer.status import StatusFile
from trainer.trackers.jsonl import read_jsonl
from trainer.training.loop import fit
from trainer.training.setup import build_run

PEAK, WARMUP, STEPS = 1e-2, 2, 8


def test_every_step_uses_and_logs_its_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps count from 0 in the formula and from 1 in metrics.jsonl."""
    make_workplace(tmp_path, dtype="float32")
    monkeypatch.chdir(tmp_path)
    changes = ["eval.every=null", "checkpoint.every=null", "metrics.routing_gap_every=null"]
    config = load(Path("tiny.yaml"), changes, ExperimentConfig)
    folder = RunFolder(tmp_path / "runs/tiny")
    run = build_run(config, folder, Console(STEPS, file=io.StringIO()), Mesh.of_one(), torch.device("cpu"))
    whole_step, given, rows = run.engine.train_step, [], []

    def train_step(batches: Any, *, lr: float, **options: Any) -> Any:
        given.append(lr)
        rows.append([int(row) for batch in batches for row in batch.sample_id[:, 0] if row >= 0])
        return whole_step(batches, lr=lr, **options)

    run.engine.train_step = train_step  # type: ignore[method-assign]
    fit(run, StopRequest(), StatusFile(folder.status, rank=0))

    expected = [PEAK * (step + 1) / WARMUP for step in range(WARMUP)]
    for step in range(WARMUP, STEPS):
        progress = (step - WARMUP) / (STEPS - 1 - WARMUP)
        expected.append(PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2))
    assert given == pytest.approx(expected, rel=1e-12)
    records = [record for record in read_jsonl(folder.metrics) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["lr"] for record in records] == given
    assert rows == [list(range(7 * step, 7 * (step + 1))) for step in range(STEPS)]
    assert [record["tokens"] for record in records] == [7 * 32 * (step + 1) for step in range(STEPS)]


def test_a_step_of_a_run_waits_once_for_the_device_and_once_more_if_it_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the loop does around a step is included, such as the agreement on a stop."""
    make_workplace(tmp_path, dtype="bfloat16")
    monkeypatch.chdir(tmp_path)
    off = ["eval.every=null", "checkpoint.every=null", "metrics.routing_gap_every=null"]
    changes = [*off, "metrics.log_every=3", "parallel.experts_kernel=grouped", "model.moe.capacity.factor=null"]
    config = load(Path("tiny.yaml"), changes, ExperimentConfig)
    folder = RunFolder(tmp_path / "runs/tiny")
    run = build_run(config, folder, Console(STEPS, file=io.StringIO()), Mesh.of_one(), torch.device("cpu"))
    tick, so_far = run.console.tick, []
    with DeviceWaits() as counted:

        def count(step: int) -> None:
            so_far.append(len(counted.waits))
            tick(step)

        run.console.tick = count  # type: ignore[method-assign]
        fit(run, StopRequest(), StatusFile(folder.status, rank=0))
    waits = [after - before for before, after in pairwise(so_far)]  # of steps 2 to 8; the last one is logged
    assert waits == [1, 2, 1, 1, 2, 1, 2], counted.by_place()


class _FakeStream:
    """Copies at once, and remembers which rows it has copied and joined."""

    def __init__(self) -> None:
        self.copied_rows: list[list[int]] = []
        self.joined_rows: list[list[int]] = []

    def copied(self, batches: Sequence[Batch]) -> list[Batch]:
        self.copied_rows.append(_rows_of(batches))
        return [batch.to(torch.device("cpu")) for batch in batches]

    def join(self, copies: Sequence[Batch]) -> None:
        self.joined_rows.append(_rows_of(copies))


def _rows_of(batches: Sequence[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.sample_id[:, 0] if row >= 0]


def _resumed_losses(tmp_path: Path, name: str, stream: _FakeStream | None) -> tuple[list[float], int]:
    """Train 4 steps, and in a second process 4 more; return all losses and the position after the first 4."""
    position = 0
    for steps in (4, STEPS):
        changes = [f"name={name}", f"train.steps={steps}", "eval.every=null", "metrics.routing_gap_every=null"]
        config = load(Path("tiny.yaml"), changes, ExperimentConfig)
        folder = RunFolder(tmp_path / "runs" / name)
        console = Console(STEPS, file=io.StringIO())
        run = build_run(config, folder, console, Mesh.of_one(), torch.device("cpu"))
        position = run.position
        run.ahead = CopyAhead(stream)
        fit(run, StopRequest(), StatusFile(folder.status, rank=0))
    return [record["loss"] for record in read_jsonl(folder.metrics) if "loss" in record], position


def test_rows_copied_ahead_are_those_of_the_step_and_of_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workplace(tmp_path, dtype="float64")
    monkeypatch.chdir(tmp_path)
    stream = _FakeStream()
    plain, ahead = _resumed_losses(tmp_path, "plain", None), _resumed_losses(tmp_path, "ahead", stream)
    assert ahead == plain and plain[1] == 4 * 7, "the position is that of the rows that were used"
    steps = [list(range(7 * step, 7 * (step + 1))) for step in range(STEPS)]
    assert stream.copied_rows == stream.joined_rows == [*steps[1:4], *steps[5:]], "but the first of each process"
