"""The directory that a run's relative paths are relative to, from any working directory."""

import json
import os
import shutil
from pathlib import Path

import pytest

from trainer.checkpoint.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run that was started in project/."""
    (tmp_path / "project/runs/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    started = RunFolder(Path("runs/a"))
    started.write_environment({"torch": "2"})
    monkeypatch.chdir(tmp_path)
    return RunFolder(Path("project/runs/a"))


def home(folder: RunFolder, *, runs_dir: str = "runs", name: str = "a") -> Path | None:
    return folder.start_directory(runs_dir=runs_dir, name=name)


def test_it_is_where_the_run_was_started(folder, tmp_path):
    assert home(folder) == tmp_path / "project"


def test_a_run_folder_that_is_moved_alone_remembers_it(folder, tmp_path):
    folder.path.rename("b")
    assert home(RunFolder(Path("b"))) == tmp_path / "project"


def test_a_run_folder_that_is_moved_with_its_text_finds_it_at_the_same_place(folder, tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    Path("project").rename("far/away/work")
    assert home(RunFolder(Path("far/away/work/runs/a"))) == tmp_path / "far/away/work"


def test_in_a_copy_of_run_and_text_it_is_the_copy(folder, tmp_path, monkeypatch):
    shutil.copytree("project", "copy")
    assert home(RunFolder(Path("copy/runs/a"))) == tmp_path / "project", "where it was trained"
    monkeypatch.chdir("copy")
    assert home(RunFolder(Path("runs/a"))) == tmp_path / "copy"


def test_a_run_elsewhere_than_its_text_is_moved_with_it_too(tmp_path, monkeypatch):
    for name in ("text", "big/runs/a"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "disk/text")
    RunFolder(tmp_path / "disk/big/runs/a").write_environment({})
    (tmp_path / "disk").rename(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert home(RunFolder(Path("other/big/runs/a")), runs_dir="/disk/big/runs") == tmp_path / "other/text"


def test_for_an_older_folder_its_own_path_determines_it(folder, tmp_path):
    folder.environment.write_text('{"torch": "2"}')
    assert home(folder) == tmp_path / "project"
    assert home(folder, name="b") is None
    assert home(folder, runs_dir="project/runs") == tmp_path
    assert home(folder, runs_dir=str(tmp_path / "project/runs")) is None


@pytest.mark.parametrize(
    "content",
    ["", "[", "[]", "null", '{"working_directory": 3}', '{"working_directory": "."}', "[" * 100_000]
    + [
        json.dumps({"working_directory": f"/{bad}", "run_folder": "/x"}) for bad in ("a\0b", "a\nb", "gone", "x" * 5000)
    ],
)
def test_malformed_records_are_ignored(folder, tmp_path, content):
    folder.environment.write_text(content)
    assert home(folder) == tmp_path / "project"
    assert home(folder, name="b") is None


def test_a_pipe_does_not_block(folder, tmp_path):
    folder.environment.unlink()
    os.mkfifo(folder.environment)
    assert home(folder) == tmp_path / "project"
