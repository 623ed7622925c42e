"""Tests for building and resuming a run: equal on all ranks, and consistent with its checkpoint."""

import io
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from trainer.checkpoint import shared_fs
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.resolve import check_run_folder
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.errors import CheckpointError, ConfigError, TurnoutError
from trainer.experiment import ExperimentConfig
from trainer.trackers.base import Trackers
from trainer.training.run import RunState
from trainer.training.screens import header
from trainer.training.setup import build_run
from trainer.training.start_trackers import start_trackers

CONFIG = """\
name: tiny
model: {num_layers: 1, d_model: 8, num_heads: 2, seq_len: 8, d_ff: 8, moe: {num_experts: 2, d_ff: 8}}
train: {steps: 10, global_batch_size: 4}
schedule: {kind: warmup_cosine, warmup_steps: 0}
"""

ORDER = (
    "from here on the order of the rows changes: in the current epoch some documents are read again and others are "
    "left out; set it back, or use a new name=..., to read each once"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and texts; its runs are in `runs`."""
    text = "It was a bright cold day in April, and the clocks were striking. " * 50
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "other.txt").write_text(text.replace("cold", "warm"))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def _config(folder: Path, overrides: list[str]) -> ExperimentConfig:
    source = f"data.sources=[{{kind: text, path: {folder}/text.txt}}]"
    places = [source, f"data.cache_dir={folder}/cache", f"runs_dir={folder}/runs"]
    return load(folder / "tiny.yaml", [*places, *overrides], ExperimentConfig)


def _build(folder: Path, overrides: list[str], mesh: Mesh | None = None) -> tuple[RunState, list[str]]:
    """Return a run and its warnings."""
    config, screen = _config(folder, overrides), io.StringIO()
    where = RunFolder(Path(config.runs_dir) / config.name)
    run = build_run(config, where, Console(0, file=screen), mesh or Mesh.of_one(), torch.device("cpu"))
    said = [line.removeprefix("warning: ") for line in screen.getvalue().splitlines() if line.startswith("warning")]
    return run, said


# --- ranks that were not given the same -------------------------------------------------------------------------------


def _error_here(folder: Path, overrides: list[list[str]], visible_s: float = 0.1) -> str | None:
    """Build the run on this rank with its own overrides; return the error, if any."""
    shared_fs.VISIBLE_S = visible_s
    mesh = mesh_here()
    try:
        _build(folder, overrides[mesh.layout.rank], mesh)
    except TurnoutError as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_a_config_that_differs_between_ranks_is_refused_by_key_value_and_rank(ranks: Ranks, folder: Path) -> None:
    other = ["schedule.peak_lr=0.002", "eval.every=7"]
    errors = ranks.run(3, _error_here, folder, [[], other, other])
    assert len(set(errors)) == 1 and errors[0].startswith("ConfigError: schedule.peak_lr: 0.001 on rank 0 (host ")
    first, second = errors[0].splitlines()
    assert "), 0.002 on ranks 1 and 2 (host " in first and first.endswith("all ranks need the same config and versions")
    assert second.startswith("eval.every: 200 on rank 0 (host ") and "), 7 on ranks 1 and 2 (host " in second


def test_hosts_may_have_their_files_in_other_places(ranks: Ranks, folder: Path) -> None:
    (folder / "mount").symlink_to(folder)
    moved = ["data.sources.0.path=text.txt", "data.cache_dir=cache", "runs_dir=runs"]
    own = [word.replace("=", f"={folder}/mount/") for word in moved]
    assert ranks.run(2, _error_here, folder, [[], own]) == [None, None]
    assert [path.name for path in (folder / "runs/tiny").glob(".start*")] == []


def test_ranks_with_different_text_are_refused(ranks: Ranks, folder: Path) -> None:
    own = [f"data.sources.0.path={folder}/other.txt"]
    errors = ranks.run(2, _error_here, folder, [[], own])
    assert all(error.startswith("DataError: data.fingerprint: ") for error in errors)
    assert all(error.endswith("; all ranks must read the same text (data.sources)") for error in errors)


def test_a_run_folder_that_a_rank_does_not_see_is_refused_at_the_start(ranks: Ranks, folder: Path) -> None:
    (folder / "own/tiny").mkdir(parents=True)
    (folder / "own/tiny/.start").write_text("of another run")
    first, second = ranks.run(2, _error_here, folder, [[], [f"runs_dir={folder}/own"]])
    assert second.startswith(f"ConfigError: rank 1: runs_dir: {folder}/own/tiny on host ")
    assert f" is not the folder that rank 0 writes into, {folder}/runs/tiny on host " in second
    assert second.endswith("; use a folder on a file system that all nodes share")
    assert first.startswith("RemoteRankError: rank 1: runs_dir: ")
    assert list((folder / "runs/tiny").iterdir()) == [], "and nothing was begun"


def _error_with_a_late_folder(folder: Path) -> str | None:
    def appear() -> None:
        time.sleep(0.3)
        (folder / "late").symlink_to(folder / "runs")

    if mesh_here().layout.rank == 1:
        threading.Thread(target=appear, daemon=True).start()
    return _error_here(folder, [[], [f"runs_dir={folder}/late"]], 20.0)


def test_a_run_folder_that_appears_late_is_waited_for(ranks: Ranks, folder: Path) -> None:
    assert ranks.run(2, _error_with_a_late_folder, folder) == [None, None]


def _error_of_groups() -> str | None:
    from torch.distributed import get_rank

    try:
        mesh_here(ep_size=1 + get_rank())
    except ConfigError as error:
        return str(error)
    return None


def test_ranks_with_other_groups_are_refused_before_they_wait_for_each_other(ranks: Ranks) -> None:
    errors = ranks.run(2, _error_of_groups)
    assert errors[0] == errors[1] is not None and errors[0].startswith("parallel.ep_size: 1 on rank 0 (host ")


# --- a run folder that has lost its config.yaml -----------------------------------------------------------------------


def _saved(folder: Path, change: Callable[[dict[str, Any]], object] = lambda info: None) -> Path:
    """Save a checkpoint of step 1 into a run folder without config.yaml; `change` edits its metadata."""
    run, said = _build(folder, [])
    assert said == []
    info = run.checkpoint_info()
    change(info)
    run.saver.start(1, run.engine.state(), info)
    saved = run.saver.wait()
    assert saved is not None and saved.error is None
    run.folder.config.unlink()
    return saved.path


def test_a_changed_config_is_compared_with_the_checkpoint(folder: Path) -> None:
    path = _saved(folder)
    where = ["parallel.micro_batch_size=2", "train.steps=20", "checkpoint.every=5", "name=tiny"]
    run, said = _build(folder, ["seed=7", "schedule.peak_lr=0.002", *where])
    assert said == [
        f"seed was 1337 in {path} and is now 7",
        f"schedule.peak_lr was 0.001 in {path} and is now 0.002",
        f"seed: {ORDER}",
        "the learning rate was 1.00e-03 in step 1 and continues at 1.99e-03 in step 2 "
        "(schedule.peak_lr: 0.001 -> 0.002, train.steps: 10 -> 20)",
    ]
    assert run.start_step == 1
    assert _build(folder, ["seed=8"])[1] == [], "the folder's config.yaml is there again, and compared before"


def test_a_change_of_the_row_order_is_warned_about_on_resume(folder: Path) -> None:
    changes = ["seed=7", "data.mixture.by=tokens", "train.global_batch_size=8", "data.workers=1"]
    where = RunFolder(folder / "runs/tiny")
    run, _ = _build(folder, [])
    said = check_run_folder(where, _config(folder, changes))
    assert said == [
        f"seed was 1337 in {where.path} and is now 7",
        f"data.mixture.by was weight in {where.path} and is now tokens",
        f"train.global_batch_size was 4 in {where.path} and is now 8",
    ], "nothing was read yet"
    run.saver.start(1, run.engine.state(), run.checkpoint_info())
    run.saver.wait()
    assert check_run_folder(where, _config(folder, changes)) == [
        *said[:2],
        f"{said[2]}; the rows keep their order, 8 a step",
        f"seed, data.mixture.by: {ORDER.replace('set it', 'set them')}",
    ]


def _without(*keys: str) -> Callable[[dict[str, Any]], object]:
    return lambda info: [info["config"]["model"].pop(key) for key in keys]


@pytest.mark.parametrize("loses_config", [False, True])
def test_a_model_key_missing_in_the_checkpoint_must_have_its_default(folder: Path, loses_config: bool) -> None:
    """Including a change that keeps all shapes."""
    path = _saved(folder, _without("rope_theta"))
    if not loses_config:
        (folder / "runs/tiny/config.yaml").write_text((folder / "tiny.yaml").read_text())
    with pytest.raises(CheckpointError) as caught:
        _build(folder, ["model.rope_theta=5000.0"])
    assert f"{path}: was written by a different model: model.rope_theta is 10000.0 in it and 5000.0 in the config" in (
        str(caught.value)
    )
    assert _build(folder, [])[0].start_step == 1


def _of_another_version(info: dict[str, Any]) -> None:
    config: Mapping[str, Any] = info["config"]
    info["config"] = {**config, "a_key_that_is_gone": 1}


def test_a_config_of_another_version_leaves_model_and_seed_to_compare(folder: Path) -> None:
    path = _saved(folder, _of_another_version)
    with pytest.raises(CheckpointError, match=r"model\.norm_eps is 1\.0e-06 in it and 0\.001 in the config"):
        _build(folder, ["model.norm_eps=1e-3"])
    assert _build(folder, ["seed=7"])[1] == [
        f"{path}: this version cannot read its config; only model and seed are compared",
        f"seed was 1337 in {path} and is now 7",
        f"seed: {ORDER}",
    ]


# --- a schedule that is another one from where a run goes on ----------------------------------------------------------


def test_a_jump_of_the_learning_rate_is_warned_about_on_resume(folder: Path) -> None:
    """In a longer run a cosine schedule that had ended is at its middle again."""
    cosine = ["schedule.peak_lr=3e-3", "train.steps=40"]
    run, _ = _build(folder, cosine)
    run.saver.start(40, run.engine.state(), run.checkpoint_info())
    saved = run.saver.wait()
    assert saved is not None and saved.error is None

    def said(*overrides: str) -> list[str]:
        resumed, warnings = _build(folder, [*cosine, *overrides])
        assert resumed.start_step == 40
        return warnings

    def jump(rate: str, changes: str) -> str:
        return f"the learning rate was 3.00e-04 in step 40 and continues at {rate} in step 41 ({changes})"

    assert said("train.steps=60") == [jump("9.34e-04", "train.steps: 40 -> 60")]
    other = ["schedule.kind=warmup_stable_decay", "schedule.warmup_steps=0", "train.steps=80"]
    kind = "schedule.kind: warmup_cosine -> warmup_stable_decay"
    changes = f"{kind}, schedule.final_fraction: 0.1 -> 0.0, train.steps: 40 -> 80"
    assert said(*other) == [jump("3.00e-03", changes)]
    assert said("train.steps=60", "schedule.peak_lr=0.000964") == [], "the rate is the same, by chance"
    assert said("schedule.peak_lr=0.1") == [], "nothing is left to train"


# --- a run that branches off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["checkpoint", "folder", "moved folder"])
def test_a_copy_is_a_run_of_its_own_in_wandb_too_and_a_moved_folder_is_not(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = _build(folder, ["name=a"])
    assert first.logs is not None
    first.logs.log({"step": 3, "loss": 2.0}, {"step": 3})
    first.saver.start(3, first.engine.state(), first.checkpoint_info())
    first.saver.wait()
    here, there = folder / "runs/a", folder / "runs/b"
    if what == "checkpoint":
        shutil.copytree(here / "checkpoints", there / "checkpoints")
    elif what == "folder":
        shutil.copytree(here, there)
    else:
        here.rename(there)
    orders: list[dict[str, Any]] = []
    monkeypatch.setattr("trainer.training.start_trackers.WandbTracker", lambda _, **given: orders.append(given))
    second, said = _build(folder, ["name=b", "metrics.wandb.mode=offline"])
    start_trackers(second)
    second.trackers = Trackers()
    assert second.start_step == 3 and orders[0]["run_id"] == second.id == (there / "run_id").read_text().strip()
    assert (second.id == first.id) == (what == "moved folder") == ("parent" not in orders[0]["config"])
    parent = {"id": first.id, "name": "a", "step": 3, "folder": str(here) if what == "folder" else None}
    if what != "moved folder":
        assert orders[0]["config"]["parent"] == second.checkpoint_info()["parent"] == parent
        (ancestor,) = orders[0]["config"]["ancestors"]
        assert (ancestor["how"], ancestor["name"], ancestor["step"], ancestor["id"]) == ("copy", "a", 3, first.id)
        assert ("made from", "a at step 3 (copy)") in header(second)
        assert f"branches off from run {first.id} ('a', step 3): a run of its own from here, {second.id}" in said[-1]
    assert not any("damaged or lost" in line for line in said), "a branch by a checkpoint alone begins a log"
