"""A tiny run for several ranks: its folder, ways to start it, and its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import imported_once
from tests.ignore_clock import without_clock
from tests.launched_ranks import ROOT, launched

CONFIG = """\
name: tiny
model:
  num_layers: 2
  d_model: 32
  num_heads: 2
  seq_len: 32
  moe: {num_experts: 5, d_ff: 32, router: {kind: bias_balanced, jitter: 0.1}, capacity: {factor: 1.5}}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
schedule: {kind: warmup_cosine, peak_lr: 1e-2, warmup_steps: 2}
train: {steps: 8, global_batch_size: 7}
eval: {every: 4, max_tokens_per_domain: 512}
parallel: {micro_batch_size: 4}
checkpoint: {every: 4, keep: 2}
metrics: {log_every: 1, routing_gap_every: 4}
"""


def make_workplace(folder: Path, *, dtype: str) -> Path:
    """Write a config and a text."""
    (folder / "tiny.yaml").write_text(CONFIG.replace("global_batch_size: 7", f"global_batch_size: 7, dtype: {dtype}"))
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    return folder


def environment() -> dict[str, str]:
    """Return the environment of a process started from scratch."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(folder: Path, *arguments: str) -> str:
    """Run a command in one process to a good end; return what it printed."""
    result = imported_once.run(["-m", "trainer", *arguments], cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_ranks(folder: Path, num_ranks: int, *arguments: str) -> str:
    """Run a command as several ranks to a good end; return what the first one printed."""
    with launched(num_ranks, ["-m", "trainer", *arguments], folder) as ranks:
        ranks.wait_for(range(num_ranks), seconds=100)
        assert ranks.codes(range(num_ranks)) == [0] * num_ranks, ranks.said()
    return (folder / "stdout.0").read_text()


def torchrun(folder: Path, num_ranks: int, *arguments: str, imports: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command under torchrun; with `imports` in processes that import everything themselves, as a user's do."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", "trainer"]
    if not imports:
        return imported_once.run([*command, *arguments], cwd=folder, timeout=200)
    command = [sys.executable, *command, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)


def numbers(folder: Path, name: str) -> list[tuple[str, float]]:
    """Return name and value of every number of metrics.jsonl that does not depend on the clock."""
    records = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [(k, v) for record in records for k, v in without_clock(record).items() if v is not None]


def assert_same(folder: Path, name: str, *, rel: float, abs: float) -> None:
    """Compare every number of a run with that of the run `alone`."""
    mine, oracle = numbers(folder, name), numbers(folder, "alone")
    assert [key for key, _ in mine] == [key for key, _ in oracle]
    assert [value for _, value in mine] == pytest.approx([value for _, value in oracle], rel=rel, abs=abs)
