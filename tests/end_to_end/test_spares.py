"""Spare machines of `launch --spares`: one takes the place of a lost one, whichever that is, and nothing else changes.

All machines are this one, with a rank each; every process is a fork (tests/imported_once.py).
"""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import imported_once
from tests.end_to_end.tiny import CONFIG, numbers, run_ranks
from tests.held_steps import HeldSteps
from trainer.supervise.machines import Machine

LIMIT_S = 100.0


class Agents:
    """The `launch` processes of a run, by machine."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.held = HeldSteps(folder / f"{name}.held", (20, 40))
        self.processes: dict[int, imported_once.Process] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def start(self, machine: int, *overrides: str, nnodes: int = 2, spares: int = 1) -> None:
        """Start the agent of a machine."""
        where = ["--nnodes", str(nnodes), "--spares", str(spares), "--node-rank", str(machine)]
        where += ["--master-addr", "127.0.0.1", "--master-port", self.port]
        self.processes[machine] = imported_once.Process(
            ["-m", "trainer", "launch", "tiny.yaml", f"name={self.name}", *where, *overrides],
            cwd=self.folder,
            stderr=self.folder / f"{self.name}.{machine}",
            environment=self.held.environment(),
        )

    def said(self, machine: int) -> str:
        """Return what a machine has said."""
        path = self.folder / f"{self.name}.{machine}"
        return path.read_text() if path.exists() else ""

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait for something."""
        end = time.monotonic() + LIMIT_S
        while not done():
            assert time.monotonic() < end, [self.said(machine) for machine in self.processes]
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged."""
        metrics = self.folder / "runs" / self.name / "metrics.jsonl"
        self.wait(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= step)

    def wait_for_spare(self, machine: int) -> None:
        """Wait until a machine can take the place of another."""
        path = self.folder / "runs" / self.name / f"machines/machine-{machine:05d}"
        here = f"{socket.gethostname()} process {self.processes[machine].pid}"

        def is_ready() -> bool:
            sign = Machine.of_json(path.read_text()) if path.exists() else None
            return sign is not None and (sign.host, sign.state) == (here, "ready")

        self.wait(is_ready)

    def codes(self) -> dict[int, int]:
        """Wait for the ends; return the exit codes."""
        return {machine: process.wait(LIMIT_S) for machine, process in self.processes.items()}

    def kill(self, machine: int) -> None:
        """Kill a machine's agent, and so its ranks, and forget it."""
        process = self.processes.pop(machine)
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a config, a text and an undisturbed run of two ranks, `whole`."""
    folder = tmp_path_factory.mktemp("spares")
    text = CONFIG.replace("steps: 8", "steps: 60").replace("checkpoint: {every: 4", "checkpoint: {every: 5")
    text = text.replace("eval: {every: 4", "eval: {every: 25").replace(", routing_gap_every: 4", "")
    (folder / "tiny.yaml").write_text(text.replace("micro_batch_size: 4", "micro_batch_size: 4, timeout_s: 5"))
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    run_ranks(folder, 2, "train", "tiny.yaml", "name=whole", "parallel.ep_size=2")
    return folder


@pytest.fixture
def agents(workplace: Path, request: pytest.FixtureRequest) -> Iterator[Agents]:
    """Return the agents of a run; kill them after the test."""
    started = Agents(workplace, f"run{abs(hash(request.node.name))}")
    yield started
    for process in started.processes.values():
        process.kill()
        process.wait(10)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_spare_takes_the_place_of_a_lost_machine_and_the_run_ends_as_if_undisturbed(
    agents: Agents, lost: int
) -> None:
    """The lost one comes back as a spare, and takes the place of the next one."""
    for machine in range(3):
        agents.start(machine, "parallel.ep_size=2")
    agents.wait(lambda: "machine 2 is a spare: it has imported torch, and waits" in agents.said(2))
    agents.wait_for_spare(2)
    agents.wait_for_step(12)
    agents.kill(lost)
    agents.held.release(20)
    agents.wait(lambda: f"machine 2 takes node {lost} in place of machine {lost}" in agents.said(2))
    agents.start(lost, "parallel.ep_size=2")
    agents.wait_for_spare(lost)
    agents.wait_for_step(25)
    agents.kill(1 - lost)
    agents.held.release(40)
    agents.wait(lambda: f"machine {lost} takes node {1 - lost} in place of machine {1 - lost}" in agents.said(lost))
    assert agents.codes() == {2: 0, lost: 0}, agents.said(2)
    assert numbers(agents.folder, agents.name) == numbers(agents.folder, "whole")
    assert "lost" in agents.said(2) and re.search(r"starting again from step \d+", agents.said(2)), agents.said(2)


def test_a_spare_ends_with_the_code_of_a_run_that_ends_without_it(agents: Agents) -> None:
    for machine in range(3):
        agents.start(machine, "parallel.ep_size=2", "train.steps=1000000")
    agents.wait_for_step(2)
    agents.processes[1].send_signal(signal.SIGTERM)
    agents.held.release()
    assert agents.codes() == {0: 75, 1: 75, 2: 75}
    assert "has ended with 75" in agents.said(2) and "Traceback" not in "".join(map(agents.said, range(3)))


def test_two_machines_of_one_number_are_refused(agents: Agents) -> None:
    agents.start(0, "parallel.ep_size=2")
    agents.wait(lambda: (agents.folder / "runs" / agents.name / "machines/machine-00000").exists())
    first = agents.processes.pop(0)
    agents.start(0, "parallel.ep_size=2")
    assert agents.codes() == {0: 2}
    assert f"NODE_RANK=0: {socket.gethostname()} process {first.pid} is this run's machine" in agents.said(0)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(LIMIT_S) == 75


@pytest.mark.nightly
def test_a_single_machine_has_a_spare_too(agents: Agents) -> None:
    for machine in range(2):
        agents.start(machine, nnodes=1)
    agents.wait_for_step(12)
    agents.wait_for_spare(1)
    status = agents.folder / "runs" / agents.name / "status/rank00000.json"
    assert json.loads(status.read_text())["state"] == "running"
    agents.kill(0)
    agents.held.release()
    assert agents.codes() == {1: 0}, agents.said(1)
    assert len(numbers(agents.folder, agents.name)) == len(numbers(agents.folder, "whole"))
