"""Start ranks as torchrun does, but with the store in a process of its own, so that a test can kill any of them."""

import multiprocessing
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests import imported_once
from trainer.distributed.interface import LOOPBACK
from trainer.distributed.store import serve

ROOT = Path(__file__).parents[1]


@dataclass(slots=True)
class Started:
    """Processes of one run."""

    processes: list[imported_once.Process]
    errors: list[Path]
    """File with the stderr of each rank."""
    store: BaseProcess
    """Process with the store."""

    def said(self) -> str:
        return "".join(f"{path.read_text()}" for path in self.errors)

    def wait_for(self, ranks: Sequence[int], *, seconds: float) -> float:
        """Wait until these ranks have ended; return the seconds it took.

        Raises:
            AssertionError: if one is still running after `seconds`.
        """
        began = time.monotonic()
        for rank in ranks:
            left = seconds - (time.monotonic() - began)
            try:
                self.processes[rank].wait(max(0.1, left))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} is still running after {seconds} s:\n{self.said()}") from None
        return time.monotonic() - began

    def codes(self, ranks: Sequence[int]) -> list[int | None]:
        return [self.processes[rank].poll() for rank in ranks]


def _have_store(pipe: Connection) -> None:
    store = serve(LOOPBACK, 0, clients=None, timeout_s=60)
    pipe.send(store.port)
    while True:
        signal.pause()


@contextmanager
def store_apart() -> Iterator[tuple[BaseProcess, int]]:
    """Run a store in its own process; yield the process and its port."""
    here, there = multiprocessing.Pipe()
    process = imported_once.CONTEXT.Process(target=_have_store, args=(there,), daemon=True)
    process.start()
    try:
        yield process, here.recv()
    finally:
        process.kill()
        process.join()


@contextmanager
def launched(
    world_size: int, arguments: Sequence[str], folder: Path, *, ranks_per_node: int | None = None
) -> Iterator[Started]:
    """Start `python ARGUMENTS` as every rank of a run; kill the remaining ones at exit.

    Args:
        world_size: number of ranks, all on this machine.
        arguments: arguments of python.
        folder: working directory; gets stdout.RANK and stderr.RANK.
        ranks_per_node: node size that the ranks are told; default: one node.
    """
    with store_apart() as (store, port):
        started = Started([], [], store)
        try:
            _start(started, world_size, arguments, folder, port=port, ranks_per_node=ranks_per_node or world_size)
            yield started
        finally:
            for process in started.processes:
                process.kill()


def _start(
    started: Started, world_size: int, arguments: Sequence[str], folder: Path, *, port: int, ranks_per_node: int
) -> None:
    for rank in range(world_size):
        environment = {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % ranks_per_node),
        }
        errors = folder / f"stderr.{rank}"
        started.errors.append(errors)
        started.processes.append(
            imported_once.Process(
                arguments, cwd=folder, stdout=folder / f"stdout.{rank}", stderr=errors, environment=environment
            )
        )
