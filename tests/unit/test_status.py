import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainer import status as module
from trainer.status import ATTEMPT, StatusFile, read_statuses, remove_others


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StatusFile:
    monkeypatch.setenv(ATTEMPT, "mine")
    return StatusFile(tmp_path / "status", rank=1)


def test_what_a_rank_does_is_read_back(file: StatusFile) -> None:
    folder = file.path.parent
    assert read_statuses(folder, "mine") == {}
    file.enter("start-up")
    file.begin_step(31, first_row=240, num_rows=8)
    status = read_statuses(folder, "mine")[1]
    assert (status.pid, status.step, status.rows, status.phase) == (os.getpid(), 31, [240, 247], "training")
    assert (status.state, status.exit_code) == ("running", None)
    assert 0 < status.started <= status.updated
    file.end(5, "rank 0 is lost\n  more of it")
    status = read_statuses(folder, "mine")[1]
    assert (status.state, status.exit_code, status.error, status.step) == ("ended", 5, "rank 0 is lost", 31)
    assert [path.name for path in folder.iterdir()] == ["rank00001.json"]


def test_steps_are_written_about_once_a_second_and_phases_at_once(
    file: StatusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 0.5, 0.9, 1.1, 1.1, 1.2])  # read once for the check and once for the write
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    seen = []
    file.enter("training")
    for step in (1, 2, 3, 4):
        file.begin_step(step, first_row=0, num_rows=1)
        seen.append(json.loads(file.path.read_text())["step"])
    assert seen == [0, 0, 0, 4]
    file.enter("saving")
    assert json.loads(file.path.read_text())["phase"] == "saving"


def test_only_this_attempt_s_whole_files_are_believed(file: StatusFile) -> None:
    file.enter("start-up")
    folder = file.path.parent
    (folder / "rank00002.json").write_text("{")
    (folder / "rank00003.json").write_text('{"attempt": "mine"}')
    (folder / "rank00004.json").write_text("[]")
    (folder / "other.json").write_text(file.path.read_text())
    assert list(read_statuses(folder, "mine")) == [1]
    assert read_statuses(folder, "another's") == {}


@pytest.mark.parametrize("make", [os.link, os.symlink])
def test_what_a_killed_rank_left_is_not_written_through(file: StatusFile, tmp_path: Path, make: Any) -> None:
    (tmp_path / "other").write_text("mine")
    file.path.parent.mkdir()
    for name in (".rank00001.json", "rank00001.json"):
        make(tmp_path / "other", file.path.parent / name)
    file.enter("start-up")
    assert (tmp_path / "other").read_text() == "mine"
    assert list(read_statuses(file.path.parent, "mine")) == [1]


def test_a_disk_that_refuses_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("a file where the folder should be")
    file = StatusFile(tmp_path / "status", rank=0)
    file.enter("start-up")
    file.begin_step(1, first_row=0, num_rows=1)
    file.end(0)
    assert read_statuses(tmp_path / "status", "") == {}


def test_a_rank_that_never_began_writes_nothing(file: StatusFile) -> None:
    file.end(2, "the folder is another run's")
    assert not file.path.exists()


def test_ranks_that_are_no_more_are_forgotten(tmp_path: Path) -> None:
    remove_others(tmp_path / "not_yet", world_size=1)
    for rank in (0, 1, 2, 100000):
        StatusFile(tmp_path, rank=rank).enter("start-up")
    (tmp_path / "other.json").touch()
    remove_others(tmp_path, world_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "rank00000.json", "rank00001.json"]
