"""Tests for new runs: all of the folder appears at once, or nothing does."""

from pathlib import Path

import pytest

from tests.converted_runs import make_run
from trainer.checkpoint.run_folder import RunFolder
from trainer.errors import ConfigError, ResourceError


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.checkpoint.streamed._write_tensors", refuse)
    with pytest.raises(ResourceError, match="No space left on device"):
        make_run(tmp_path, "tiny", None)
    assert not (tmp_path / "runs").exists()


def test_what_a_killed_command_left_is_not_a_run_and_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "runs" / ".tiny.partial"
    (left / "checkpoints" / "step_00000000").mkdir(parents=True)
    (left / "metrics.jsonl").write_text("half")
    run = make_run(tmp_path, "tiny", None)
    assert list((tmp_path / "runs").iterdir()) == [run] and not (run / "metrics.jsonl").exists()


def test_two_writers_of_one_run_do_not_mix(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "runs" / ".tiny.partial")
    first.lock()
    with pytest.raises(ConfigError, match="is training into it"):
        make_run(tmp_path, "tiny", None)
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_run_that_is_written_can_be_trained_in_the_same_process(tmp_path: Path) -> None:
    assert RunFolder(make_run(tmp_path, "tiny", None)).owner() is None
