"""Tests for the pages that `report` writes, once and while a run trains."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny_training import config_of, train_here
from trainer.cli import main
from trainer.commands import report_runs
from trainer.commands.reported_run import ReportedRun
from trainer.report.measure_options import MeasureOptions
from trainer.runs.recorded_run import RecordedRun

FEW = MeasureOptions(max_tokens=64, max_checkpoints=1)
ARGUMENTS = ("--max-tokens", "64", "--checkpoints", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for name, line in (("a", "It was a bright cold day in April.\n"), ("b", "\u00dcber allen Gipfeln ist Ruh.\n")):
        (folder / f"{name}.txt").write_text(line * 300)
    sources = ", ".join(f"{{kind: text, path: {folder}/{name}.txt, domain: {name}}}" for name in "ab")
    config = config_of(folder, f"data.sources=[{sources}]", "model.moe.router={kind: top_k, top_k: 2}")
    train_here(config)
    return Path(config.runs_dir) / config.name


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RecordedRun:
    return RecordedRun(Path(shutil.copytree(finished, tmp_path / "run")))


@contextmanager
def _training(run: RecordedRun) -> Iterator[None]:
    """Hold a run's lock, as the process that trains it does."""
    lock = os.open(run.path / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _log(run: RecordedRun, **values: float) -> None:
    with run.folder.metrics.open("a") as file:
        file.write(json.dumps(values) + "\n")


def test_the_page_and_the_numbers_are_written_together(run: RecordedRun, tmp_path: Path) -> None:
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    assert _exit_code("report", str(run.path), "-o", str(page), "--json", str(numbers), *ARGUMENTS) == 0
    (data,) = json.loads(numbers.read_text())
    text = page.read_text()
    assert f'data-value="{data["layers"][0]["load_imbalance"]!r}"' in text
    last = [record["loss"] for record in run.metrics() if "loss" in record][-1]
    assert f"<b>{last:.5g}</b>" in text
    assert data["card"]["last"]["loss"] == last


def test_bad_outputs_are_refused(run: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(run.path)
    for arguments, message in [
        (["-o", str(tmp_path / "no" / "a.html")], f"--output: {tmp_path / 'no' / 'a.html'}: there is no folder"),
        (["-o", str(tmp_path / "a"), "--json", str(tmp_path / "a")], "is the file of the page too; name another one"),
        (["--follow"], "--follow: writes a page again and again; name it with -o FILE"),
    ]:
        assert _exit_code("report", path, *arguments) == 2
        assert message in capsys.readouterr().err


def test_only_a_new_checkpoint_is_measured_again(run: RecordedRun) -> None:
    reported = ReportedRun(run.path, FEW)
    first = reported.newest()
    _log(run, step=13, loss=0.125, tokens=9000)
    second = reported.newest()
    assert second.layers is first.layers
    assert (second.card.last["loss"], second.card.trained_tokens, second.card.step) == (0.125, 9000, first.card.step)
    assert second.card.parameters == first.card.parameters
    shutil.rmtree(run.folder.checkpoints / f"step_{first.card.step:08d}")
    third = reported.newest()
    assert third.card.step == run.checkpoints[-1] != first.card.step
    assert third.layers is not first.layers


def test_checkpoints_that_cannot_be_read_leave_the_curves(run: RecordedRun) -> None:
    manifests = [run.folder.checkpoints / f"step_{step:08d}" / "manifest.json" for step in run.checkpoints]
    reported, whole = ReportedRun(run.path, FEW), [manifest.read_bytes() for manifest in manifests]
    for manifest in manifests:
        manifest.write_text("{")
    bare = reported.newest()
    assert bare.text is None and bare.card.last
    assert bare.remarks[0].startswith("The newest checkpoint was not measured: ")
    for manifest, content in zip(manifests, whole, strict=True):
        manifest.write_bytes(content)
    again = reported.newest()
    assert again.text is not None and not [one for one in again.remarks if "was not measured" in one]


def test_a_run_that_cannot_be_measured_does_not_hide_the_others(
    run: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its logs are on the page, and the exit code says that something is missing."""
    damaged, page = Path(shutil.copytree(run.path, tmp_path / "damaged")), tmp_path / "page.html"
    for manifest in damaged.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    assert _exit_code("report", str(damaged), str(run.path), "-o", str(page), *ARGUMENTS) == 4
    assert "The newest checkpoint was not measured: " in page.read_text()
    assert "What each expert is for" in page.read_text()
    assert str(damaged) in capsys.readouterr().err


def test_an_older_checkpoint_is_measured_once_where_the_newest_is_damaged(run: RecordedRun) -> None:
    (run.folder.checkpoints / f"step_{run.checkpoints[-1]:08d}" / "manifest.json").write_text("{")
    reported = ReportedRun(run.path, FEW)
    first = reported.newest()
    assert first.card.step == run.checkpoints[-2]
    assert reported.newest().layers is first.layers


def test_a_run_has_ended_when_its_steps_are_done_or_nobody_trains_it_twice(run: RecordedRun) -> None:
    with _training(run):
        assert not ReportedRun(run.path, FEW).has_ended()
    assert ReportedRun(run.path, FEW).has_ended()
    lines = run.folder.metrics.read_text().splitlines(keepends=True)
    run.folder.metrics.write_text("".join(lines[:2]))
    stopped = ReportedRun(run.path, FEW)
    assert [stopped.has_ended(), stopped.has_ended()] == [False, True]
    with _training(run):
        assert not stopped.has_ended()
    assert not stopped.has_ended()


def test_a_followed_page_grows_with_its_run_and_ends_with_it(
    run: RecordedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, seen = tmp_path / "page.html", []
    training = _training(run)

    def pass_time(seconds: float) -> None:
        """Be the training, while the report waits."""
        seen.append(page.read_text())
        assert seconds == 7
        if len(seen) == 1:
            _log(run, step=13, loss=0.0625)
        else:
            training.__exit__(None, None, None)
            _log(run, step=14, loss=0.03125)

    monkeypatch.setattr(report_runs.time, "sleep", pass_time)
    with training:
        assert _exit_code("report", str(run.path), "-o", str(page), "--follow", "--every", "7", *ARGUMENTS) == 0
    assert ["<b>0.0625</b>" in text for text in seen] == [False, True]
    assert "<b>0.03125</b>" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"], "nothing half-written is left"


def _exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code
