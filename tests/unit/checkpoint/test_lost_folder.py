"""A run folder that is moved or removed during a run is recreated without losing anything that was in memory."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.distributed.signals import StopRequest
from trainer.errors import ConfigError, RemoteRankError, TurnoutError
from trainer.experiment import ExperimentConfig
from trainer.status import StatusFile
from trainer.trackers.jsonl import read_jsonl
from trainer.training.loop import fit
from trainer.training.setup import build_run

CONFIG = """\
name: tiny
model: {num_layers: 1, d_model: 8, num_heads: 2, seq_len: 8, d_ff: 8, moe: {num_experts: 2, d_ff: 8}}
train: {steps: 8, global_batch_size: 4}
eval: {max_tokens_per_domain: 64}
schedule: {kind: warmup_cosine, warmup_steps: 0}
checkpoint: {every: 3, asynchronous: false}
metrics: {log_every: 1}
"""
FILES = ["config.yaml", "environment.json", "metrics.jsonl", "routing.jsonl", "run_id", "tokenizer.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 50)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def _train(folder: Path, harm: Callable[[Path], object], mesh: Mesh | None = None) -> tuple[list[str], str | None]:
    """Train, damage the run folder before step 5; return the warnings and the error."""
    mesh, screen = mesh or Mesh.of_one(), io.StringIO()
    places = [f"data.sources=[{{kind: text, path: {folder}/text.txt}}]", f"data.cache_dir={folder}/cache"]
    bpe = "data.tokenizer={kind: bpe, vocab_size: 270}"
    config = load(folder / "tiny.yaml", [*places, bpe, f"runs_dir={folder}/runs"], ExperimentConfig)
    where = RunFolder(folder / "runs/tiny")
    if mesh.layout.rank == 0:
        where.lock()
    run = build_run(config, where, Console(config.train.steps, file=screen, width=1000), mesh, torch.device("cpu"))
    take, status = run.engine.train_step, StatusFile(where.status, rank=mesh.layout.rank)
    step = 0

    def train_step(*arguments: object, **options: object) -> object:
        nonlocal step
        step += 1
        if step == 5 and mesh.layout.rank == 0:
            harm(where.path)
        return take(*arguments, **options)  # type: ignore[arg-type]

    run.engine.train_step = train_step  # type: ignore[method-assign, assignment]
    error = None
    try:
        fit(run, StopRequest(), status)
    except TurnoutError as caught:
        error = f"{type(caught).__name__} {caught.exit_code}: {caught}"
    run.saver.close()
    said = [line.removeprefix("warning: ") for line in screen.getvalue().splitlines() if line.startswith("warning")]
    return said, error


def _steps(run: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]


def _remove(run: Path) -> None:
    shutil.rmtree(run)


def _remove_but_for_a_status(run: Path) -> None:
    """Although another rank writes its status right after."""
    shutil.rmtree(run)
    StatusFile(run / "status", rank=1).enter("training")


def _move(run: Path) -> None:
    run.rename(run.with_name("moved"))


@pytest.mark.parametrize("harm", [_remove, _remove_but_for_a_status, _move])
def test_a_lost_folder_is_recreated_and_saved_into_at_once(folder: Path, harm: Callable[[Path], object]) -> None:
    said, error = _train(folder, harm)
    run = folder / "runs/tiny"
    assert error is None
    was = f"was moved to {folder}/runs/moved" if harm is _move else "was removed"
    assert said[0] == f"{run}: {was} while the run trains; it has been recreated, and the run continues in it"
    assert [line for line in said[1:] if "are restored" not in line] == []
    assert {path.name for path in run.iterdir()} >= {*FILES, ".lock", "checkpoints", "status"}
    assert _steps(run) == [*range(1, 9)], "every line is there"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_{s:08d}" for s in (5, 6, 8)]
    with pytest.raises(ConfigError, match="is training into it"):
        RunFolder(run).lock()


def test_a_lost_lock_is_taken_again(folder: Path) -> None:
    said, error = _train(folder, lambda run: (run / ".lock").unlink())
    assert error is None
    assert said == [
        f"{folder}/runs/tiny: its .lock was moved or removed while the run trains; it has been locked again"
    ]


def _give_to_another(run: Path) -> None:
    shutil.rmtree(run)
    other = RunFolder(run)
    other.lock()
    held.append(other)


def _put_another_there(run: Path) -> None:
    run.rename(run.with_name("moved"))
    run.mkdir()
    (run / "run_id").write_text("0123456789abcdef\n")


held: list[RunFolder] = []


@pytest.mark.parametrize("harm", [_give_to_another, _put_another_there])
def test_a_folder_that_became_another_run_s_ends_the_run_and_is_unchanged(
    folder: Path, harm: Callable[[Path], object]
) -> None:
    said, error = _train(folder, harm)
    assert error is not None and said == []
    assert error.startswith("ConfigError 2: the folder of this run was moved or removed, and is another run's now: ")
    assert "is training into it" in error if harm is _give_to_another else "it has another run_id" in error
    assert not (folder / "runs/tiny/checkpoints").exists() and not (folder / "runs/tiny/config.yaml").exists()
    held.clear()


def _on_a_rank(folder: Path, harm: Callable[[Path], object]) -> tuple[list[str], str | None]:
    return _train(folder, harm, mesh_here())


def test_all_ranks_save_into_it_or_end_together(ranks: Ranks, folder: Path) -> None:
    (said, error), (_, other) = ranks.run(2, _on_a_rank, folder, _remove)
    assert error is other is None and "it has been recreated" in said[0]
    assert sorted(path.name for path in (folder / "runs/tiny/checkpoints").iterdir())[0] == "step_00000005"
    shutil.rmtree(folder / "runs")
    (_, error), (_, other) = ranks.run(2, _on_a_rank, folder, _put_another_there)
    assert error is not None and error.startswith("ConfigError 2: rank 0: the folder of this run")
    assert other is not None and other.startswith(f"{RemoteRankError.__name__} 2: ")
