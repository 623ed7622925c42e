"""A sweep goes on wherever it was stopped, and ends with the table of one that was not."""

import errno
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import imported_once
from tests.held_steps import HeldSteps
from tests.sweep_outcomes import places
from tests.tiny_training import CONFIG, train_here
from trainer.atomic_io import replace_file
from trainer.errors import PREEMPTED
from trainer.sweep.plan_trials import Trial, plan_sweep
from trainer.sweep.run_sweep import FAILED, run_sweep
from trainer.sweep.trial_result import TrialResult, read_result

SWEEP = """\
name: ks
config: tiny.yaml
common: {model.moe.router: {kind: top_k, normalize: false}, train.steps: 60, checkpoint: {every: 2, keep: 2}}
over: {model.moe.router.top_k: [1, 2]}
points: [{name: orphan, init_from: {run: nowhere}}]
"""
PATIENCE_S = 240


def start(folder: Path, environment: Mapping[str, str] | None = None) -> imported_once.Process:
    command = ["-m", "trainer", "sweep", "s.yaml", *places(folder)]
    stdout, stderr = folder / "stdout", folder / "stderr"
    return imported_once.Process(command, cwd=folder, stdout=stdout, stderr=stderr, environment=environment)


def wait_for(folder: Path, process: imported_once.Process) -> tuple[int, str]:
    """Wait for the end; return the exit code and what was said."""
    code = process.wait(PATIENCE_S)
    return code, (folder / "stdout").read_text() + (folder / "stderr").read_text()


def newest_step(trial: Trial) -> int:
    names = [path.name for path in trial.folder.checkpoints.glob("step_*")]
    return max((int(name[5:]) for name in names), default=0)


def interrupt(folder: Path, number: signal.Signals, trial: Trial) -> tuple[int, str, int]:
    """Run the sweep until a trial has gone on from where it was, and send a signal to the sweep alone."""
    before = newest_step(trial)
    held = HeldSteps(folder / "held", (before + 15,), run=trial.name)
    process = start(folder, held.environment())
    end = time.monotonic() + PATIENCE_S
    while newest_step(trial) <= before and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(number)
    return *wait_for(folder, process), newest_step(trial)


def table(folder: Path) -> dict[str, Any]:
    """Return sweep.json without its times, and without what failed."""
    record = json.loads((folder / "runs/ks/sweep.json").read_text())
    for candidate in record["candidates"]:
        del candidate["train_s"], candidate["failures"]
        for trial in candidate["trials"]:
            del trial["train_s"]
    return record


def test_logs_are_read_once_other_runs_are_named_and_a_full_disk_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trials train in this process, where the sweep would start others."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "s.yaml").write_text(SWEEP)
    here = [*places(tmp_path), "train.steps=2", "points=[{train.steps: 3}]", "over.model.moe.router.top_k=[1, 2]"]
    sweep = plan_sweep(tmp_path / "s.yaml", here)
    (sweep.folder / "older").mkdir(parents=True)
    (sweep.folder / "older/config.yaml").touch()
    read, written = list[str](), list[int]()

    def run_trials(trials: Sequence[Trial], **_: object) -> Iterator[tuple[Trial, str | None]]:
        for trial in trials:
            train_here(trial.config)
            yield trial, None

    def read_counted(trial: Trial, metric: str, step: int) -> TrialResult:
        read.append(trial.name)
        return read_result(trial, metric, step)

    def write_on_a_full_disk(path: Path, text: str) -> None:
        written.append(len(written))
        if len(written) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(path, text)

    monkeypatch.setattr("trainer.sweep.run_sweep.run_trials", run_trials)
    monkeypatch.setattr("trainer.sweep.run_sweep.read_result", read_counted)
    monkeypatch.setattr("trainer.console.result_tables.replace_file", write_on_a_full_disk)
    assert run_sweep(sweep) == 0
    said = capsys.readouterr().out
    assert sorted(read) == sorted(trial.name for trial in sweep.trials)
    assert "ks has runs that are no trials of this sweep: older; they are left as they are" in said
    assert "warning: " in said and "sweep.json: cannot be written: No space left on device; make room" in said
    ended = [(one["name"], one["steps"], one["is_final"]) for one in table(tmp_path)["candidates"]]
    assert ended == [("top_k-1", 2, True), ("top_k-2", 2, True), ("steps-3", 3, True)], "each at its own end"


def test_trials_that_cannot_start_are_in_the_table_with_their_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "s.yaml").write_text(SWEEP)
    sweep = plan_sweep(tmp_path / "s.yaml", [*places(tmp_path), "points=[]"])
    for trial in sweep.trials:
        trial.folder.path.with_name(f"{trial.name}.log").mkdir(parents=True)
    assert run_sweep(sweep) == FAILED
    said = capsys.readouterr().out
    for trial in sweep.trials:
        assert f"failed: {trial.name}: {sweep.folder}: cannot be written: Is a directory" in said


@pytest.mark.nightly
def test_a_sweep_that_was_killed_three_times_ends_with_the_same_table(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.yaml").write_text(CONFIG)
        (tmp_path / name / "s.yaml").write_text(SWEEP)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    never_stopped = plan_sweep(whole / "s.yaml", [*places(whole), "points=[]"])
    for trial in never_stopped.trials:
        train_here(trial.config)
    assert run_sweep(never_stopped) == 0, "both have trained already"

    first, second, orphan = plan_sweep(killed / "s.yaml", places(killed)).trials
    for trial in (first, first, second):
        code, said, step = interrupt(killed, signal.SIGKILL, trial)
        assert (code, step < 60) == (-signal.SIGKILL, True), said
    code, said, step = interrupt(killed, signal.SIGTERM, second)
    assert (code, step < 60) == (PREEMPTED, True) and "stopped by SIGTERM: trials have saved" in said
    assert not orphan.folder.path.exists()
    code, said = wait_for(killed, start(killed))
    assert code == FAILED and "1 of 3 trials have trained to step 60 already" in said
    reason = f"{orphan.name}: exit code "
    assert f"failed: {reason}" in said and "nowhere" in said
    assert newest_step(first) == newest_step(second) == 60

    [*ended, failed], expected = table(killed)["candidates"], table(whole)
    assert ended == expected["candidates"]
    assert (failed["mean"], failed["trials"]) == (None, [])
    assert table(killed)["recommended"] == expected["recommended"] != None  # noqa: E711
    assert "recommended: top_k-" in said and (killed / "runs/ks/sweep.svg").read_text().count("<circle") == 4
