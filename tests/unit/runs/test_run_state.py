"""Tests for what a run is doing: one that was trained here, and folders of runs that were killed or still run."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.run_folders import dead_pid, make_run, write_status
from tests.tiny_training import config_of
from trainer import train
from trainer.checkpoint.run_folder import RunFolder
from trainer.runs.run_state import read_state


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, whose process, this one, still holds its lock."""
    return train(config_of(tmp_path_factory.mktemp("trained"), "train.steps=4", "eval.every=4")).path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "a", "train.steps=10", losses=[3.0, 2.0, 1.0, 1.5])


def test_a_finished_run_is_finished_while_its_process_lives_and_in_a_copy(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    for path in (trained, copy):
        state = read_state(path)
        assert (state.state, state.exit_code, state.step, state.steps, state.ranks) == ("finished", 0, 4, 4, 1)
        assert state.left_s is None and not state.notes and not state.troubled
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-2])
    assert (last["step"], last["loss"]) == (4, read_state(trained).loss)


def test_a_killed_run_is_not_shown_as_running(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    write_status(copy, 0, dead_pid(), step=3)
    assert (read_state(copy).state, read_state(copy).exit_code) == ("killed", None)
    write_status(copy, 0, os.getpid(), step=3)  # a copy of a run that trains: nothing holds the copy's lock
    assert read_state(copy).state == "killed"


def test_a_young_process_with_the_number_of_a_dead_one_is_not_it(run: Path) -> None:
    write_status(run, 0, os.getpid(), started=1e6)
    assert read_state(run).state == "killed"
    write_status(run, 0, os.getpid())  # no lock, as on a file system without them, but the process is there
    assert read_state(run).state == "running"


def test_a_running_run_says_how_far_and_how_fast_and_names_its_ranks(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(run)
    folder.lock()
    assert (read_state(run).state, read_state(run).phase) == ("running", "start-up")
    write_status(run, 0, os.getpid(), step=9)
    write_status(run, 1, os.getpid(), step=9)
    state = read_state(run)
    assert (state.state, state.phase, state.step, state.ranks) == ("running", "training", 9, 2)
    assert (state.tokens_per_s, state.step_s, state.left_s, state.loss) == (50, 2, 2, 1.5)
    assert state.troubled == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"step": 2}, "is behind: in step 2, others are in 9"),
        ({"step": 7}, None),  # within two seconds' steps and one
        ({"step": 9, "updated": now - 100}, "is silent for 100 s, in step 9"),
        ({"step": 9, "updated": now - 100, "phase": "evaluating"}, None),
        ({"step": 9, "pid": dead_pid()}, "is gone: it ended in step 9 without saying why"),
        ({"step": 9, "state": "ended", "exit_code": 7, "error": "no disk"}, "ended with exit code 7: no disk"),
    ]
    for values, said in cases:
        write_status(run, 1, values.pop("pid", os.getpid()), **values)
        troubled = read_state(run).troubled
        assert len(troubled) == (said is not None)
        assert said is None or (troubled[0].startswith("rank 1 (pid ") and troubled[0].endswith(said)), troubled
    folder._lock = None  # closes and so releases it


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({"state": "ended", "exit_code": 0}, "finished"),
        ({"state": "ended", "exit_code": 75}, "stopped"),
        ({"state": "ended", "exit_code": 6, "error": "loss is not finite"}, "failed"),
        ({"host": "elsewhere"}, "running"),
        ({"host": "elsewhere", "updated": 1e6}, "unknown"),
        ({"host": "elsewhere", "updated": 9e18}, "unknown"),
    ],
)
def test_an_end_and_a_rank_elsewhere_are_judged(run: Path, values: dict[str, Any], state: str) -> None:
    write_status(run, 0, dead_pid(), **values)
    found = read_state(run)
    assert (found.state, found.exit_code, found.error) == (state, values.get("exit_code"), values.get("error"))


def test_the_rank_that_failed_first_says_why(run: Path) -> None:
    write_status(run, 0, dead_pid(), state="ended", exit_code=5, error="rank 1 was lost", updated=2e6)
    write_status(run, 1, dead_pid(), state="ended", exit_code=7, error="no disk", updated=1e6)
    assert (read_state(run).state, read_state(run).exit_code, read_state(run).error) == ("failed", 7, "no disk")


def test_ranks_of_an_earlier_start_are_left_out(run: Path) -> None:
    write_status(run, 0, os.getpid(), attempt="new")
    write_status(run, 1, dead_pid(), attempt="old", updated=1e6)
    assert (read_state(run).ranks, read_state(run).troubled) == (1, [])


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"rank": "x"}', "\udcff", '{"updated": NaN}'])
def test_damaged_files_are_said_and_stop_nothing(run: Path, content: str) -> None:
    write_status(run, 0, dead_pid(), state="ended", exit_code=0)
    (run / "status/rank00001.json").write_text(content, errors="surrogateescape")
    (run / "metrics.jsonl").write_text('{"step": 1}\nxx\n')
    state = read_state(run)
    assert state.state == "finished"
    assert state.notes == ["metrics.jsonl: line 2 damaged", "status/rank00001.json is damaged"]
    (run / "config.yaml").write_text("train: [")
    assert (read_state(run).state, read_state(run).steps, len(read_state(run).notes)) == ("damaged", None, 3)
