"""Pruning a stopped run: never the checkpoints it needs, and damaged ones only on request."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint_helpers import save
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tools.pruning import plan_prune
from trainer.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for step in (5, 10, 15, 20, 25):
        state = TrainState(slices={"model.a": Slice.whole(torch.ones(4))})
        save(CheckpointFolder(tmp_path, keep=99), step, state)
    return tmp_path


def _damage(path: Path, *steps: int) -> None:
    for step in steps:
        (CheckpointFolder(path).of_step(step) / "manifest.json").write_text("{}")


def test_older_checkpoints_are_removed_and_every_nth_is_kept(path: Path) -> None:
    plan = plan_prune(CheckpointFolder(path, keep=2, keep_every=10), with_damaged=False)
    assert (plan.remove, plan.keep, plan.damaged) == ([5, 15], [10, 20, 25], {})


def test_damaged_checkpoints_are_kept_and_not_counted(path: Path) -> None:
    _damage(path, 5, 20, 25)
    plan = plan_prune(CheckpointFolder(path, keep=1), with_damaged=False)
    assert (plan.remove, plan.keep, list(plan.damaged)) == ([10], [15], [5, 20, 25])


def test_damaged_checkpoints_are_removed_on_request(path: Path) -> None:
    _damage(path, 5, 20, 25)
    plan = plan_prune(CheckpointFolder(path, keep=1), with_damaged=True)
    assert (plan.remove, plan.keep) == ([5, 10, 20, 25], [15])


@pytest.mark.parametrize("with_damaged", [False, True])
def test_without_an_intact_checkpoint_nothing_is_removed(path: Path, with_damaged: bool) -> None:
    _damage(path, 5, 10, 15, 20, 25)
    with pytest.raises(CheckpointError, match="none of 5 checkpoints is intact; nothing is removed"):
        plan_prune(CheckpointFolder(path), with_damaged=with_damaged)


def test_leftovers_of_killed_runs_of_any_kind_are_listed_and_removed(path: Path) -> None:
    (path / ".tmp-step_00000030").mkdir()
    (path / ".trash-step_00000001").symlink_to(path / "step_00000005")
    (path / ".tmp-step_00000035").write_text("x")
    folder = CheckpointFolder(path)
    names = [entry.name for entry in plan_prune(folder, with_damaged=False).leftovers]
    assert names == [".tmp-step_00000030", ".tmp-step_00000035", ".trash-step_00000001"]
    folder.clean()
    assert folder.leftovers() == [] and folder.steps() == [5, 10, 15, 20, 25]
    assert folder.defect(5) is None, "a link is removed, and not what it names"


@pytest.mark.parametrize("is_link", [False, True])
def test_foreign_names_are_kept_even_through_a_link(path: Path, tmp_path: Path, is_link: bool) -> None:
    """The folder may be a link to a disk with files of others."""
    others = [".tmp-backup", ".trash-1000", ".tmp-step_5", ".trash-step_00000005.old", "step_5", "step_000000010.bak"]
    for name in others:
        (path / name / "work").mkdir(parents=True)
    if is_link:
        (tmp_path / "link").symlink_to(path)
    folder = CheckpointFolder(tmp_path / "link" if is_link else path, keep=1)
    state = TrainState(slices={"model.a": Slice.whole(torch.ones(4))})
    plan_prune(folder, with_damaged=True)
    folder.clean()
    save(folder, 30, state)
    assert folder.steps() == [30]
    assert all((path / name / "work").is_dir() for name in others)
