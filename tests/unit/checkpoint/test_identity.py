"""Run ids: kept when a run resumes, new when it branches off."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.identity import Identity, identify
from trainer.checkpoint.run_folder import RunFolder

A = "0123456789"


def _start(path: Path, *, found: Mapping[str, Any] | None = None, step: int = 0, name: str | None = None) -> Identity:
    path.mkdir(parents=True, exist_ok=True)
    return identify(RunFolder(path), name=name or path.name, found=found, step=step)


def _checkpoint(identity: Identity | str, name: str) -> dict[str, Any]:
    """Return the record of the run in a checkpoint."""
    run_id = identity if isinstance(identity, str) else identity.id
    parent = None if isinstance(identity, str) or identity.parent is None else {"id": identity.parent.id, "step": 1}
    return {"id": run_id, "parent": parent, "config": {"name": name}}


def _kept(path: Path) -> str:
    return (path / "run_id").read_text().strip()


# --- the same run -----------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_id(tmp_path: Path):
    first = _start(tmp_path / "a")
    assert re.fullmatch("[0-9a-f]{16}", first.id) and first == Identity(id=first.id, parent=None, said=None)
    assert _start(tmp_path / "a") == _start(tmp_path / "a", found=_checkpoint(first, "a"), step=5) == first
    assert _kept(tmp_path / "a") == first.id


def test_a_lost_id_is_restored_from_a_checkpoint(tmp_path: Path):
    for found in (_checkpoint(A, "a"), {"id": A}):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        assert _start(tmp_path / "a", found=found) == Identity(id=A, parent=None, said=None)
        assert (tmp_path / "a/run_id").read_text() == f"{A}\n"


@pytest.mark.parametrize("kept", ["", "../../x", "x" * 65, "A" * 16, "a" * 7, "\udcff"])
def test_an_invalid_id_is_replaced(tmp_path: Path, kept: str):
    (tmp_path / "run_id").write_text(kept, errors="surrogateescape")
    found = _start(tmp_path, found={"id": ["no text"]}).id
    assert re.fullmatch("[0-9a-f]{16}", found) and (tmp_path / "run_id").read_text() == f"{found}\n"


@pytest.mark.parametrize("is_old", [False, True])
def test_a_folder_that_is_moved_is_the_same_run_under_any_name(tmp_path: Path, is_old: bool):
    """Even if it was written by a version that did not record its folder."""
    first = _start(tmp_path / "runs/a")
    if is_old:
        (tmp_path / "runs/a/origin.json").unlink()
    for path in (tmp_path / "runs/b", tmp_path / "elsewhere/a"):
        path.parent.mkdir(exist_ok=True)
        next(tmp_path.glob("*/[ab]")).rename(path)
        assert _start(path, found=_checkpoint(first, "a"), step=5) == first


def test_a_copy_without_its_original_is_the_same_run(tmp_path: Path):
    first = _start(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert _start(tmp_path / "b", found=_checkpoint(first, "a"), step=5) == first


def test_a_run_continues_in_its_folder_despite_copies(tmp_path: Path):
    first = _start(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "backup")
    assert _start(tmp_path / "a", found=_checkpoint(first, "a"), step=5) == first
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(tmp_path / "backup", tmp_path / "a")
    assert _start(tmp_path / "a", found=_checkpoint(first, "a"), step=5) == first


def test_the_same_folder_by_another_path_is_the_same_run(tmp_path: Path):
    first = _start(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path)
    assert _start(tmp_path / "link/a") == first


# --- a branch ---------------------------------------------------------------------------------------------------------


def _assert_branch(branch: Identity, of: Identity, path: Path, *, step: int, folder: Path | None) -> None:
    assert branch.id != of.id and re.fullmatch("[0-9a-f]{16}", branch.id) and branch.id == _kept(path)
    assert branch.parent is not None
    origin = {"id": of.id, "name": "a", "step": step, "folder": None if folder is None else str(folder)}
    assert json.loads((path / "origin.json").read_text()) == {
        "id": branch.id,
        "name": path.name,
        "folder": str(path),
        "parent": origin,
    }
    assert branch.said == (
        f"{path}: branches off from run {of.id} ('a', step {step}): a run of its own from here, {branch.id}"
    )


def test_a_copied_checkpoint_under_another_name_is_a_branch(tmp_path: Path):
    first = _start(tmp_path / "a")
    branch = _start(tmp_path / "b", found=_checkpoint(first, "a"), step=40)
    _assert_branch(branch, first, tmp_path / "b", step=40, folder=None)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("name", ["b", "a"])
def test_a_copied_folder_is_a_branch_while_the_original_exists(tmp_path: Path, name: str, is_old: bool):
    first, path = _start(tmp_path / "runs/a"), tmp_path / ("runs" if name == "b" else "others") / name
    if is_old:
        (tmp_path / "runs/a/origin.json").unlink()
    shutil.copytree(tmp_path / "runs/a", path)
    branch = _start(path, found=_checkpoint(first, "a"), step=40)
    if is_old and name == "a":
        assert branch == first, "nothing tells it from a run whose folder was moved"
        return
    _assert_branch(branch, first, path, step=40, folder=tmp_path / "runs/a")
    assert _start(tmp_path / "runs/a", found=_checkpoint(first, "a"), step=40) == first


def test_a_copied_folder_without_a_checkpoint_is_a_branch_too(tmp_path: Path):
    first = _start(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _assert_branch(_start(tmp_path / "b"), first, tmp_path / "b", step=0, folder=tmp_path / "a")


def test_a_checkpoint_of_another_run_in_a_folder_that_has_one_is_a_branch(tmp_path: Path):
    first, other = _start(tmp_path / "a"), _start(tmp_path / "b")
    branch = _start(tmp_path / "b", found=_checkpoint(first, "a"), step=40)
    assert branch.id != other.id
    _assert_branch(branch, first, tmp_path / "b", step=40, folder=None)


def test_a_branch_is_one_run_from_then_on(tmp_path: Path):
    """Until the first save of a branch, its newest checkpoint is its parent's."""
    first = _start(tmp_path / "a")
    branch = _start(tmp_path / "b", found=_checkpoint(first, "a"), step=40)
    again = Identity(id=branch.id, parent=branch.parent, said=None)
    assert _start(tmp_path / "b", found=_checkpoint(first, "a"), step=40) == again
    assert _start(tmp_path / "b", found=_checkpoint(branch, "b"), step=50) == again
    (tmp_path / "b").rename(tmp_path / "c")
    assert _start(tmp_path / "c", found=_checkpoint(branch, "b"), step=50) == again


def test_a_lost_id_of_a_branch_is_restored_from_its_checkpoint(tmp_path: Path):
    first = _start(tmp_path / "a")
    branch = _start(tmp_path / "b", found=_checkpoint(first, "a"), step=40)
    shutil.rmtree(tmp_path / "b")
    again = _start(tmp_path / "b", found=_checkpoint(branch, "b"), step=50)
    assert again.id == branch.id and again.parent is not None and again.parent.id == first.id


def test_writing_the_id_back_makes_a_copy_the_same_run(tmp_path: Path):
    first = _start(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _start(tmp_path / "b", found=_checkpoint(first, "a"), step=40)
    (tmp_path / "b/run_id").write_text(first.id)
    assert _start(tmp_path / "b", found=_checkpoint(first, "a"), step=40).id == first.id


def test_a_branch_killed_at_its_start_does_not_take_its_parent_s_id(tmp_path: Path):
    """Killed after run_id was written and before origin.json was."""
    first = _start(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/run_id").write_text("f" * 16)
    branch = _start(tmp_path / "b", found=_checkpoint(first, "a"), step=40)
    assert branch.id != first.id and branch.parent is not None and branch.parent.id == first.id


FOREIGN = [
    "[" * 100_000,
    "[]",
    "x" * 200_000,
    '{"id": 1, "folder": [], "parent": {"id": "../x"}}',
    '{"folder": "\\u0000"}',
    json.dumps({"folder": "/" + "x" * 5000, "parent": {"id": "a" * 9, "step": -1}}),
]


@pytest.mark.parametrize("text", FOREIGN)
def test_malformed_origins_are_ignored(tmp_path: Path, text: str):
    first = _start(tmp_path / "a")
    (tmp_path / "a/origin.json").write_text(text)
    assert _start(tmp_path / "a", found=_checkpoint(first, "a"), step=5) == first
    assert json.loads((tmp_path / "a/origin.json").read_text())["folder"] == str(tmp_path / "a")


@pytest.mark.parametrize("name", ["run_id", "origin.json"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_irregular_files_do_not_block_and_are_replaced(tmp_path: Path, name: str, make: Any):
    (tmp_path / "a").mkdir()
    make(tmp_path / "a" / name)
    assert _start(tmp_path / "a", found=_checkpoint(A, "a"), step=5).id == A
    assert (tmp_path / "a" / name).is_file() and not (tmp_path / "a" / name).is_symlink()


def test_a_foreign_name_with_control_characters_is_not_printed(tmp_path: Path):
    said = _start(tmp_path / "b", found=_checkpoint(A, "a\x1b[2J\n"), step=5).said
    assert said is not None and said.isprintable()
