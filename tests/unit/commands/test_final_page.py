"""Tests for the page that rank 0 writes when a training ends, which never fails a run."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tiny_training import config_of_text, train_here
from trainer import fault_injection
from trainer.atomic_io import NotRegular
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands import final_page
from trainer.commands.final_page import write_final_page
from trainer.distributed.signals import StopRequest
from trainer.experiment import ExperimentConfig
from trainer.runs.recorded_log import read_log
from trainer.status import StatusFile

MOE = "model.moe.router={kind: top_k, top_k: 2}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    config = config_of_text(tmp_path_factory.mktemp("run"), MOE, "train.steps=3")
    train_here(config)
    return config


@pytest.fixture
def folder(trained: ExperimentConfig) -> RunFolder:
    folder = RunFolder(Path(trained.runs_dir) / trained.name)
    folder.report.unlink(missing_ok=True)
    folder.report_numbers.unlink(missing_ok=True)
    return folder


def _write(
    config: ExperimentConfig, folder: RunFolder, how: str | None, *, stop: StopRequest | None = None, done: bool = True
) -> None:
    metrics = config.metrics.model_copy(update={"report": how})
    config = config.model_copy(update={"metrics": metrics})
    write_final_page(config, folder, StatusFile(folder.status, rank=0), stop or StopRequest(), is_finished=done)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a script be what measures a run."""

    def use(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(final_page, "sys", SimpleNamespace(executable=str(path), modules={}, stderr=sys.stderr))

    return use


def test_the_page_from_logs_has_their_numbers(
    trained: ExperimentConfig, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(trained, folder, "logs", done=False)
    page, (data,) = folder.report.read_text(), json.loads(folder.report_numbers.read_text())
    log = read_log(folder.metrics)
    for key in ("loss", "eval/loss", "load_imbalance"):
        assert data["card"]["last"][key] == log.newest(key)
        assert f"{log.newest(key):.5g}" in page
    assert data["text"] is None and data["layers"] == []
    assert f"python -m trainer report {folder.path} -o {folder.report}" in page
    assert "<dt>steps</dt><dd><bdi>3 of 3</bdi></dd>" in page
    said = capsys.readouterr()
    assert said.out == f"  report      {folder.report}\n" and said.err == ""


def test_null_writes_nothing(trained: ExperimentConfig, folder: RunFolder) -> None:
    _write(trained, folder, None)
    assert not folder.report.exists() and not folder.report_numbers.exists()


def test_full_is_what_the_command_measures(trained: ExperimentConfig, folder: RunFolder) -> None:
    _write(trained, folder, "full")
    (data,) = json.loads(folder.report_numbers.read_text())
    assert data["text"]["loss"] == pytest.approx(read_log(folder.metrics).newest("eval/loss"), abs=1e-12)
    assert len(data["layers"]) == 2 and "What each expert is for" in folder.report.read_text()


def test_a_run_that_was_stopped_is_not_measured(
    trained: ExperimentConfig, folder: RunFolder, python: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    python("exit 9")
    _write(trained, folder, "full", done=False)
    assert folder.report.exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo it has no text >&2; exit 3", "it has no text"),
        ("kill -9 $$", "exit code -9"),
        ("sleep 60", "measuring them was not done in 0.1 s"),
    ],
)
def test_a_fault_of_the_measuring_leaves_the_page_from_logs(
    script: str,
    why: str,
    trained: ExperimentConfig,
    folder: RunFolder,
    python: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    python(script)
    if "sleep" in script:
        monkeypatch.setattr(final_page, "LIMIT_S", 0.1)
    _write(trained, folder, "full")
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {folder.report}: the experts are not in it: ") and f"{why}; write it by" in said
    assert "The experts were not measured" in folder.report.read_text()


def test_a_stop_ends_the_measuring(
    trained: ExperimentConfig, folder: RunFolder, python: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    python("exec sleep 60")
    stop = StopRequest()
    stop.requested_by = "SIGTERM"
    _write(trained, folder, "full", stop=stop)
    assert "measuring them was stopped by SIGTERM; write it by" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RecursionError(), NotRegular()])
def test_no_fault_of_the_page_fails_a_run(
    error: Exception,
    trained: ExperimentConfig,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(point: str) -> None:
        assert point == "report.page"
        raise error

    monkeypatch.setattr(fault_injection, "hit", fail)
    _write(trained, folder, "logs")
    said = capsys.readouterr()
    why = getattr(error, "strerror", None) or type(error).__name__
    assert said.err == f"warning: {folder.report}: {why}; write it by: python -m trainer report {folder.path} -o FILE\n"
    assert said.out == ""


def test_a_folder_in_its_place_or_logs_of_nonsense_are_a_warning_at_most(
    trained: ExperimentConfig, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.report.mkdir()
    _write(trained, folder, "logs")
    assert f"warning: {folder.report}: Is a directory; " in capsys.readouterr().err
    folder.report.rmdir()
    before = folder.metrics.read_bytes()
    folder.metrics.write_bytes(before + b'\xff\n{"step": 3, "loss": [}\n{"step": 4, "loss": "<b>"}\n{"step": 5, "lo')
    try:
        _write(trained, folder, "logs")
    finally:
        folder.metrics.write_bytes(before)
    assert capsys.readouterr().err == ""
    assert "2 damaged lines of metrics.jsonl are left out" in folder.report.read_text()
    assert not list(folder.path.glob(".report*")), "nothing half-written is left"
