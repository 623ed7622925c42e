"""Lock of a run folder."""

import errno
import os
from pathlib import Path

import pytest

from tests.folders import content_of, hard_linked
from trainer.checkpoint.run_folder import RunFolder
from trainer.errors import ConfigError


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_not_a_file_is_refused_and_not_written_through(tmp_path: Path, kind: str) -> None:
    other, lock = tmp_path / "other", tmp_path / "run/.lock"
    other.write_text("mine")
    lock.parent.mkdir()
    match kind:
        case "link":
            lock.symlink_to(other)
        case "pipe":
            os.mkfifo(lock)
        case "folder":
            lock.mkdir()
    with pytest.raises(ConfigError, match=r"run/\.lock: is not a regular file; remove it"):
        RunFolder(tmp_path / "run").lock()
    assert other.read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link to nothing", "pipe"])
def test_checkpoints_that_are_not_a_folder_are_refused_before_the_first_step(tmp_path: Path, kind: str) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.parent.mkdir()
    match kind:
        case "file":
            checkpoints.touch()
        case "link to nothing":
            checkpoints.symlink_to(tmp_path / "nothing")
        case "pipe":
            os.mkfifo(checkpoints)
    with pytest.raises(ConfigError, match=r"run/checkpoints: is not a folder, and checkpoints go there; remove it"):
        RunFolder(tmp_path / "run").lock()


def test_a_lock_that_a_snapshot_shares_is_not_written_through_and_locks_its_own_folder(tmp_path: Path) -> None:
    original = RunFolder(tmp_path / "run")
    original.lock()
    said = (tmp_path / "run/.lock").read_text()
    del original
    hard_linked(tmp_path / "run", tmp_path / "snapshot")
    (tmp_path / "run/.lock").write_text("what it said")
    copy = RunFolder(tmp_path / "snapshot")
    copy.lock()
    assert (tmp_path / "run/.lock").read_text() == "what it said"
    assert (tmp_path / "snapshot/.lock").read_text() == said
    first = RunFolder(tmp_path / "run")
    first.lock()  # each has a lock of its own now
    for name in ("run", "snapshot"):
        with pytest.raises(ConfigError, match=r"is training into it; wait for it, or use another name=\.\.\.$"):
            RunFolder(tmp_path / name).lock()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".lock", ".lock"]


def test_a_snapshot_of_a_run_that_goes_on_is_refused_with_what_to_do(tmp_path: Path) -> None:
    original = RunFolder(tmp_path / "run")
    original.lock()
    before = hard_linked(tmp_path / "run", tmp_path / "snapshot")
    copy = RunFolder(tmp_path / "snapshot")
    for attempt in (copy.lock, copy.check_free):
        with pytest.raises(
            ConfigError, match=rf"process {os.getpid()} is .* a copy of \(cp -al\), remove .*snapshot/\.lock$"
        ):
            attempt()
    assert content_of(tmp_path / "run") == content_of(tmp_path / "snapshot") == before
    (tmp_path / "snapshot/.lock").unlink()
    copy.lock()


def test_a_link_to_another_run_s_checkpoints_is_refused_and_one_to_another_disk_is_not(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a").lock()
    for where, is_refused in (("a/checkpoints", True), ("disk/b", False)):
        (tmp_path / where).mkdir(parents=True)
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b/checkpoints").unlink(missing_ok=True)
        (tmp_path / "b/checkpoints").symlink_to(tmp_path / where)
        if is_refused:
            with pytest.raises(ConfigError, match=r"b/checkpoints: is a link into another run's folder, .*/a, whose"):
                RunFolder(tmp_path / "b").lock()
        else:
            RunFolder(tmp_path / "b").lock()


def test_a_lock_that_is_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    assert RunFolder(tmp_path).owner() is None


def test_the_lock_names_its_owner(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.lock()
    with pytest.raises(ConfigError, match=rf"run: .* process {os.getpid()} is training into it"):
        RunFolder(tmp_path / "run").lock()


def test_a_full_disk_does_not_prevent_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoint prune` frees space, and is needed most on a full disk."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    first = RunFolder(tmp_path / "run")
    first.lock()
    with pytest.raises(ConfigError, match="another process is training into it"):
        RunFolder(tmp_path / "run").lock()
