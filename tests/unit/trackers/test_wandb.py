"""Weights & Biases: the records it gets, and runs that its failures must not affect."""

import json
import os
import shutil
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
from trainer.cli import main
from trainer.errors import PREEMPTED
from trainer.metrics.config import WandbConfig
from trainer.trackers import wandb
from trainer.trackers.base import JsonlTracker
from trainer.trackers.wandb import WandbTracker

pytestmark = pytest.mark.slow

ID = "0a1b2c3d"
LABELS = {"tags": ["a"], "group": "g"}
UNREACHABLE = "http://127.0.0.1:9"
LONG_S = 100.0
"""Time limit for a process to start on a busy machine."""


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run without API key or server, in an empty home folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/.netrc"))


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Check that no temporary files are left behind."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield place
    end = time.monotonic() + LONG_S
    while (left := list(place.iterdir())) and time.monotonic() < end:  # an upload outlives its run
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
    """One start of a run, with the trackers only."""

    folder: Path
    mode: str = "online"
    start_step: int = 0
    said: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        metrics, routing, alarms = (self.folder / f"{name}.jsonl" for name in ("metrics", "routing", "alarms"))
        self.logs = JsonlTracker(metrics, routing, alarms=alarms, warn=self.warned.append)
        self.logs.resume_at(self.start_step)
        self.wandb = WandbTracker(
            self.folder,
            mode=self.mode,
            run_id=ID,
            start_step=self.start_step,
            heatmap_every=3,
            moe_layers=[1],
            labels={**WandbConfig.model_validate(LABELS).model_dump(exclude={"mode"}), "name": "tiny"},
            config={"model": {"num_layers": 2}},
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

    def ring(self, step: int, state: str = "rings") -> None:
        """Log an alarm."""
        text = {"message": "layer 1: few experts", "advice": "a cure"}
        self.logs.log_alarm({"step": step, "alarm": "collapse", "state": state, **text})

    def _log(self, record: dict[str, Any], experts: dict[str, Any] | None = None) -> None:
        self.logs.log(record, experts)
        self.wandb.log(record, experts)

    @property
    def upload(self) -> psutil.Process:
        assert self.wandb._upload is not None
        return psutil.Process(self.wandb._upload._process.pid)

    def wait_for(self, messages: list[str]) -> None:
        """Wait for the first message."""
        end = time.monotonic() + LONG_S
        while not messages and time.monotonic() < end:
            self.wandb.log({})
            time.sleep(0.05)
        assert messages

    def finish(self, exit_code: int = 0) -> None:
        """End in order, on a machine that may be busy."""
        self.wait_for(self.said)
        self.wandb.close(exit_code, patience_s=LONG_S)

    def kill(self) -> None:
        """End as by SIGKILL: the upload process gets no exit code."""
        upload = self.wandb._upload
        assert upload is not None and upload._process.stdin is not None
        upload._process.stdin.close()
        assert upload.wait(LONG_S) is not None


def written(folder: Path) -> list[dict[str, Any]]:
    """Return the numbers of metrics.jsonl, line by line."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if v is not None} for record in records]


def received(server: WandbServer) -> list[dict[str, Any]]:
    """Return the rows that the server has, without histograms."""
    return [{k: v for k, v in row.items() if not k.startswith("load/")} for row in server.rows(ID)]


@pytest.mark.nightly
def test_a_killed_online_run_resumes_where_its_server_is(tmp_path: Path, server: WandbServer):
    first = Attempt(tmp_path)
    first.ring(12)
    first.train(25)
    first.wait_for(first.said)
    first.kill()
    hard_linked(tmp_path / "wandb", tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "snapshot/.cache")  # its service may still be writing its own log
    shared = content_of(tmp_path / "snapshot")
    second = Attempt(tmp_path, start_step=20)
    second.ring(27, "ended")
    second.ring(28)
    second.train(30)
    second.finish()
    assert content_of(tmp_path / "snapshot") == shared, "another name of the same files was written through"
    assert received(server) == written(tmp_path)
    assert [(alert["title"], alert["text"].split(";")) for alert in server.alerts] == [
        ("alarm collapse", [f"step {step}: layer 1: few experts", " a cure"]) for step in (12, 28)
    ], "an alarm is sent once, its end is not"
    assert server.url in second.said[0] and not second.warned
    assert second.said[1] == "wandb: steps 21 to 25 were sent before and are not sent again"
    assert second.wandb.written() == [("wandb", second.said[0].removeprefix("wandb: "))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()], "a key was written down"
    assert not [path for path in server.paths if "/sdk/" in path], "errors were reported elsewhere"


def test_a_run_that_was_not_tracked_from_its_start_is_sent_as_a_whole_and_is_preempted_if_it_was_stopped(
    tmp_path: Path, server: WandbServer
):
    logs = JsonlTracker(tmp_path / "metrics.jsonl", tmp_path / "routing.jsonl", warn=print)
    logs.log({"step": 1, "loss": 2.0})
    attempt = Attempt(tmp_path, start_step=1)
    attempt.train(3)
    attempt.finish(PREEMPTED)
    assert (server.runs[ID]["preempting"], server.runs[ID]["exitcode"]) == (True, PREEMPTED)
    assert [row["step"] for row in received(server)] == [1, 2, 3]


@pytest.mark.parametrize(("mode", "is_warning"), [("auto", False), ("online", True)])
def test_without_a_key_a_run_is_left_for_a_later_upload(tmp_path: Path, mode: str, is_warning: bool):
    attempt = Attempt(tmp_path, mode)
    attempt.wait_for(attempt.warned if is_warning else attempt.said)
    attempt.wandb.close(0, patience_s=LONG_S)
    (line,) = attempt.said + attempt.warned
    assert line.startswith("wandb: No API key configured")
    assert line.endswith(f"to upload the rest: turnout sync-wandb {tmp_path}")
    assert attempt.wandb.written() == [("wandb", f"turnout sync-wandb {tmp_path}")]


@pytest.mark.parametrize(("mode", "variable"), [("offline", "online"), ("auto", "offline")])
def test_an_offline_run_is_uploaded_once_by_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, variable: str
):
    monkeypatch.setenv("WANDB_MODE", variable)
    first = Attempt(tmp_path, mode)
    first.train(25)
    second = Attempt(tmp_path, mode, start_step=20)
    second.train(30)
    second.wandb.close(0, patience_s=10.0)
    assert second.said == [f"wandb: offline; to upload the run: turnout sync-wandb {tmp_path}"] and not second.warned
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        assert wandb.sync(tmp_path, print)
        assert received(server) == written(tmp_path)
        assert server.summary(ID)["best/eval/loss"] == 1.0
        assert [row["step"] for row in server.rows(ID) if "load/layer_01" in row] == [*range(1, 31, 3)]
        assert wandb.sync(tmp_path, print)
        assert received(server) == written(tmp_path), "a second upload adds nothing"


def test_an_unreachable_server_costs_a_warning_and_sync_uploads_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_BASE_URL", UNREACHABLE)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    attempt = Attempt(tmp_path)
    attempt.train(5)
    began = time.monotonic()
    attempt.wandb.close(0, patience_s=1.0)
    assert time.monotonic() - began < 3.0
    assert attempt.warned == [
        "wandb: did not finish within 1 s; metrics.jsonl is complete; to upload the rest: turnout sync-wandb "
        f"{tmp_path}"
    ]
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        assert wandb.sync(tmp_path, print)
        assert received(server) == written(tmp_path)


def test_a_process_that_hangs_delays_a_run_for_no_longer_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 1000\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    attempt = Attempt(tmp_path)
    attempt.train(5)
    assert attempt.wandb.written() == [("wandb", f"turnout sync-wandb {tmp_path}")], "no message yet"
    process = attempt.upload
    began = time.monotonic()
    attempt.wandb.close(0, patience_s=1.0)
    assert time.monotonic() - began < 3.0
    assert not process.is_running()
    (warning,) = attempt.warned
    assert warning.startswith("wandb: did not finish within 1 s; ")


@pytest.mark.nightly
def test_records_that_a_silent_server_did_not_take_are_sent_by_sync(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wandb, "_FINISH_S", 1.0)
    attempt = Attempt(tmp_path)
    attempt.wait_for(attempt.said)
    server.answers.clear()
    attempt.train(12)
    attempt.wandb.close(0, patience_s=LONG_S)
    (warning,) = attempt.warned
    assert warning.startswith("wandb: not all records were sent in time; metrics.jsonl is complete; to upload the rest")
    server.answers.set()
    assert wandb.sync(tmp_path, print)
    assert received(server) == written(tmp_path)


@pytest.mark.parametrize("whose", ["wandb's", "ours"])
def test_a_process_that_is_killed_costs_a_warning_and_the_next_start_sends_the_rest(
    tmp_path: Path, server: WandbServer, whose: str
):
    attempt = Attempt(tmp_path)
    attempt.wait_for(attempt.said)
    service = attempt.upload.children()[0]
    (service if whose == "wandb's" else attempt.upload).kill()
    attempt.train(5)
    attempt.wait_for(attempt.warned)
    attempt.wandb.close(0, patience_s=LONG_S)
    (warning,) = attempt.warned
    assert "metrics.jsonl is complete; to upload the rest: turnout sync-wandb" in warning
    again = Attempt(tmp_path, start_step=5)
    again.finish()
    assert received(server) == written(tmp_path)


def test_a_full_disk_costs_a_warning(tmp_path: Path, server: WandbServer):
    attempt = Attempt(tmp_path)
    attempt.wait_for(attempt.said)
    for process in (attempt.upload, *attempt.upload.children()):
        process.rlimit(psutil.RLIMIT_FSIZE, (0, 0))
    attempt.train(5)
    attempt.wandb.close(0, patience_s=LONG_S)
    (warning,) = attempt.warned
    assert "metrics.jsonl is complete" in warning
    assert len(written(tmp_path)) == 5


def test_a_run_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path):
    (tmp_path / "wandb").write_text("in the way")
    attempt = Attempt(tmp_path)
    attempt.train(5)
    attempt.wandb.close(0, patience_s=10.0)
    (warning,) = attempt.warned
    assert warning.startswith("wandb: cannot start: ") and len(written(tmp_path)) == 5


def test_sync_refuses_a_run_without_wandb(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["sync-wandb", str(tmp_path)])
    assert capsys.readouterr().err == (
        f"{tmp_path}: was trained without wandb; set metrics.wandb.mode to offline or online, and start it again\n"
    )
