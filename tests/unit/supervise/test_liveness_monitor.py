"""Liveness of the processes of an attempt, from their messages."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from trainer.distributed import liveness_pipe as of_process
from trainer.distributed.liveness_pipe import CpuProgress, start_liveness_thread
from trainer.distributed.signals import StopRequest
from trainer.errors import StopRequested
from trainer.status import LIVENESS_PIPE, StatusFile
from trainer.supervise import liveness_monitor
from trainer.supervise.liveness_monitor import LivenessMonitor


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch) -> Iterator[LivenessMonitor]:
    """A liveness monitor, with this process as one of its children."""
    monkeypatch.setattr(of_process, "_INTERVAL_S", 0.01)
    with closing(LivenessMonitor("0")) as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


def write(life: LivenessMonitor, text: str) -> None:
    (pipe,) = [Path(folder) / LIVENESS_PIPE for folder in life.environment.values()]
    with pipe.open("w") as file:
        file.write(text)


def look(life: LivenessMonitor, monkeypatch: pytest.MonkeyPatch, *, after_s: float) -> None:
    """Poll again, as if `after_s` seconds after the last poll."""
    monkeypatch.setattr(life, "_polled_at", time.monotonic() - after_s)
    life.poll()


def test_silent_is_who_was_started_or_heard_and_is_heard_no_more(
    life: LivenessMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        look(life, monkeypatch, after_s=1.0)
    assert life.silent(2.5) == ["0"] and life.silent(3.5) == []
    write(life, "0\n1\n")
    look(life, monkeypatch, after_s=1.0)
    assert life.silent(0.5) == []
    write(life, "0\n0\n")
    look(life, monkeypatch, after_s=1.0)
    assert life.silent(0.5) == ["1"]


def test_time_for_which_the_supervisor_was_stopped_itself_is_no_silence_of_theirs(
    life: LivenessMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(life, monkeypatch, after_s=1000.0)
    assert life.silent(1.5) == []


def test_a_process_shows_life_again_and_again(life: LivenessMonitor) -> None:
    start_liveness_thread("7")
    for _ in range(3):
        life._silence_s["7"] = 1e6
        end = time.monotonic() + 30
        while life.silent(1e5):
            assert time.monotonic() < end
            time.sleep(0.01)
            life.poll()


def test_an_only_rank_that_computes_nothing_in_the_middle_of_a_step_shows_no_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked_s = 0.0
    monkeypatch.setattr(of_process, "_cpu_s", lambda: worked_s)
    status = StatusFile(tmp_path, rank=0)
    progress = CpuProgress(status)
    assert progress.is_made() and progress.is_made(), "in start-up"
    status.begin_step(3, first_row=0, num_rows=1)
    assert progress.is_made() and not progress.is_made() and not progress.is_made()
    for _ in range(2):  # slow on a busy host
        worked_s += 0.006
        assert not progress.is_made()
        worked_s += 0.006
        assert progress.is_made() and not progress.is_made()
    status.begin_step(4, first_row=1, num_rows=1)
    assert progress.is_made() and not progress.is_made()
    for phase in ("saving", "evaluating", "reading"):
        status.enter(phase)
        assert progress.is_made() and progress.is_made(), "waiting there may take long"
    assert CpuProgress(None).is_made(), "with other ranks"


def test_without_a_supervisor_or_after_its_end_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TURNOUT_WATCHED", raising=False)
    start_liveness_thread("0")
    monkeypatch.setenv("TURNOUT_WATCHED", str(tmp_path / "gone"))
    start_liveness_thread("0")


def test_a_system_without_room_for_a_pipe_takes_nobody_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> str:
        raise OSError

    monkeypatch.setattr(liveness_monitor.tempfile, "mkdtemp", full)
    life = LivenessMonitor("0")
    assert life.environment == {}
    for _ in range(3):
        life.poll()
        life.record_stop_signal("SIGINT")
    assert life.silent(0.0) == []
    life.close()


def test_a_process_that_a_supervisor_asks_to_stop_says_what_the_supervisor_was_sent(life: LivenessMonitor) -> None:
    life.record_stop_signal("SIGINT")
    with pytest.raises(StopRequested, match="stopped by SIGINT before its first step"), StopRequest():
        signal.raise_signal(signal.SIGTERM)
    life.record_stop_signal("no signal\x1b[2J")
    with pytest.raises(StopRequested, match="stopped by SIGTERM before its first step"), StopRequest():
        signal.raise_signal(signal.SIGTERM)


def test_nothing_is_left_of_the_pipe(life: LivenessMonitor) -> None:
    (folder,) = map(Path, life.environment.values())
    assert folder.stat().st_mode & 0o777 == 0o700, "of this user alone"
    life.close()
    assert not folder.exists() and not os.path.lexists(folder)


def test_work_is_that_of_the_other_threads() -> None:
    before = of_process._cpu_s()
    end = time.thread_time() + 0.05
    while time.thread_time() < end:  # of this thread
        pass
    assert of_process._cpu_s() - before < 0.04
