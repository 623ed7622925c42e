"""Weights & Biases beside a run: what it gets, and what its troubles cost the run, which is nothing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.folders import content_of, hard_linked
from tests.wandb_server import KEY, WandbServer
from trainer.errors import PREEMPTED
from trainer.metrics.config import MetricsConfig
from trainer.trackers import wandb
from trainer.trackers.base import JsonlTracker
from trainer.trackers.wandb import WandbTracker

pytestmark = pytest.mark.slow

ID = "0a1b2c3d"
LABELS = {"tags": ["a"], "group": "g"}
NOBODY = "http://127.0.0.1:9"
LONG_S = 100.0
"""A process may take so long to start on a busy machine."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no server, and a home of its own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/.netrc"))


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for temporary files, in which nothing is left, however it ends."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield place
    end = time.monotonic() + LONG_S
    while (left := list(place.iterdir())) and time.monotonic() < end:  # a mirror outlives its run
        time.sleep(0.05)
    assert not left


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@dataclass
class Attempt:
    """One start of a run, as far as its trackers know it."""

    folder: Path
    mode: str = "online"
    start_step: int = 0
    said: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lines = JsonlTracker(self.folder / "metrics.jsonl", self.folder / "routing.jsonl", warn=self.warned.append)
        self.lines.resume_at(self.start_step)
        self.wandb = WandbTracker(
            MetricsConfig.model_validate({"wandb": {"mode": self.mode, **LABELS}, "heatmap_every": 3}),
            folder=self.folder,
            run_id=ID,
            name="tiny",
            start_step=self.start_step,
            moe_layers=[1],
            described={"model": {"num_layers": 2}},
            say=self.said.append,
            warn=self.warned.append,
        )

    def train(self, until: int) -> None:
        """Log every step, and an evaluation every ten."""
        for step in range(self.start_step + 1, until + 1):
            experts = {"step": step, "counts": [[step, 1]], "dropped": [0]}
            self._log({"step": step, "loss": 9.0 / step, "mfu": None}, experts)
            if step % 10 == 0:
                self._log({"step": step, "eval/loss": abs(step - 10.0) + 1})

    def _log(self, record: dict[str, Any], experts: dict[str, Any] | None = None) -> None:
        self.lines.log(record, experts)
        self.wandb.log(record, experts)

    @property
    def mirror(self) -> psutil.Process:
        assert self.wandb._mirror is not None
        return psutil.Process(self.wandb._mirror.pid)

    def wait_for(self, said: list[str]) -> None:
        """Train no further before wandb has spoken."""
        end = time.monotonic() + LONG_S
        while not said and time.monotonic() < end:
            self.wandb.log({})
            time.sleep(0.05)
        assert said

    def finish(self, exit_code: int = 0) -> None:
        """End in order, on a machine that may be busy."""
        self.wait_for(self.said)
        self.wandb.close(exit_code, patience_s=LONG_S)

    def be_killed(self) -> None:
        """As SIGKILL does it: the mirror hears no exit code."""
        mirror = self.wandb._mirror
        assert mirror is not None and mirror.stdin is not None
        mirror.stdin.close()
        mirror.wait(LONG_S)


def written(folder: Path) -> list[dict[str, Any]]:
    """The numbers of metrics.jsonl, line by line."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if v is not None} for record in records]


def received(server: WandbServer) -> list[dict[str, Any]]:
    """What wandb's server has, without pictures."""
    return [{k: v for k, v in row.items() if not k.startswith("load/")} for row in server.rows(ID)]


def upload(folder: Path, server: WandbServer) -> list[Path]:
    """Hand all that lies in a run folder to wandb's own `sync`; return what it was."""
    runs = sorted((folder / "wandb").glob("*run-*"))
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", *map(str, runs)]
    environment = {**os.environ, **server.environment}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=LONG_S, capture_output=True)
    return runs


def test_an_online_run_that_was_killed_goes_on_where_its_server_says(tmp_path: Path, server: WandbServer):
    first = Attempt(tmp_path)
    first.train(25)
    first.wait_for(first.said)
    first.be_killed()
    hard_linked(tmp_path / "wandb", tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "snapshot/.cache")  # its service may still be writing its own log
    shared = content_of(tmp_path / "snapshot")
    second = Attempt(tmp_path, start_step=20)
    second.train(30)
    second.finish()
    assert content_of(tmp_path / "snapshot") == shared, "another name of the same files was written through"
    assert received(server) == written(tmp_path)
    assert server.url in second.said[0] and not second.warned
    assert second.wandb.written() == [("wandb", second.said[0].removeprefix("wandb: "))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()], "a key was written down"
    assert not [path for path in server.paths if "/sdk/" in path], "errors were reported elsewhere"


def test_a_run_that_was_not_tracked_from_its_start_is_sent_as_a_whole_and_is_preempted_if_it_was_stopped(
    tmp_path: Path, server: WandbServer
):
    lines = JsonlTracker(tmp_path / "metrics.jsonl", tmp_path / "routing.jsonl", warn=print)
    lines.log({"step": 1, "loss": 2.0})
    attempt = Attempt(tmp_path, start_step=1)
    attempt.train(3)
    attempt.finish(PREEMPTED)
    assert (server.runs[ID]["preempting"], server.runs[ID]["exitcode"]) == (True, PREEMPTED)
    assert [row["step"] for row in received(server)] == [1, 2, 3]


@pytest.mark.parametrize(("mode", "is_warning"), [("auto", False), ("online", True)])
def test_without_a_key_a_run_is_kept_offline(tmp_path: Path, mode: str, is_warning: bool):
    attempt = Attempt(tmp_path, mode)
    attempt.wait_for(attempt.warned if is_warning else attempt.said)
    attempt.wandb.close(0, patience_s=LONG_S)
    (line,) = attempt.said + attempt.warned
    assert line.startswith("wandb: No API key configured") and "kept offline; to upload it: wandb sync " in line
    assert Path(line.split()[-1]).is_dir()
    assert attempt.wandb.written() == [("wandb", line.split()[-1])]


def test_a_server_that_nobody_reaches_costs_a_warning_and_the_run_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wandb, "_ANSWER_S", 0.2)
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    attempt = Attempt(tmp_path)
    attempt.train(5)
    attempt.wandb.close(0, patience_s=LONG_S)
    assert len(attempt.warned) == 1, attempt.warned
    with WandbServer() as server:
        upload(tmp_path, server)
        assert received(server) == written(tmp_path)


def test_a_process_that_hangs_holds_a_run_up_for_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 1000\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    monkeypatch.setattr(wandb, "_ANSWER_S", 0.2)
    attempt = Attempt(tmp_path)
    attempt.train(5)
    assert attempt.wandb.written() == [("wandb", str(tmp_path / "wandb"))], "it has not said anything"
    process = attempt.mirror
    began = time.monotonic()
    attempt.wandb.close(0, patience_s=1.0)
    assert time.monotonic() - began < 3.0
    assert not process.is_running()
    assert attempt.warned[0] == "wandb: its server did not answer before the run had ended"
    assert attempt.warned[1].startswith("wandb: it did not finish within 1 s; ")


def test_what_a_server_that_falls_silent_did_not_take_is_on_the_disk(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wandb, "_FINISH_S", 1.0)
    attempt = Attempt(tmp_path)
    attempt.wait_for(attempt.said)
    server.answers.clear()
    attempt.train(12)
    attempt.wandb.close(0, patience_s=LONG_S)
    (warning,) = attempt.warned
    assert warning.startswith("wandb: not all was sent; to send the rest: wandb sync ")
    server.answers.set()
    server.runs.clear()
    upload(tmp_path, server)
    assert received(server) == written(tmp_path)


@pytest.mark.parametrize("whose", ["wandb's", "the mirror's"])
def test_a_process_that_is_killed_costs_a_warning_and_the_next_start_sends_the_rest(
    tmp_path: Path, server: WandbServer, whose: str
):
    attempt = Attempt(tmp_path)
    attempt.wait_for(attempt.said)
    service = attempt.mirror.children()[0]
    (service if whose == "wandb's" else attempt.mirror).kill()
    attempt.train(5)
    attempt.wait_for(attempt.warned)
    attempt.wandb.close(0, patience_s=LONG_S)
    (warning,) = attempt.warned
    assert "metrics.jsonl has everything, and to start the run again sends the rest" in warning
    again = Attempt(tmp_path, start_step=5)
    again.finish()
    assert received(server) == written(tmp_path)


def test_a_full_disk_costs_a_warning(tmp_path: Path):
    attempt = Attempt(tmp_path, "offline")
    attempt.wait_for(attempt.said)
    for process in (attempt.mirror, *attempt.mirror.children()):
        process.rlimit(psutil.RLIMIT_FSIZE, (0, 0))
    attempt.train(5)
    attempt.wandb.close(0, patience_s=LONG_S)
    (warning,) = attempt.warned
    assert "metrics.jsonl has everything" in warning
    assert len(written(tmp_path)) == 5
