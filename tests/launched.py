"""Ranks as torchrun starts them, without it: its store is in a process of its own, so a test may harm what it likes."""

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

from tests import warm
from trainer.distributed.interface import LOOPBACK
from trainer.distributed.store import serve

ROOT = Path(__file__).parents[1]


@dataclass(slots=True)
class Started:
    """Processes of one run."""

    processes: list[warm.Process]
    errors: list[Path]
    """What each has written to stderr."""
    store: BaseProcess
    """Has the store; `os.kill` it, or stop it."""

    def said(self) -> str:
        return "".join(f"{path.read_text()}" for path in self.errors)

    def wait_for(self, ranks: Sequence[int], *, seconds: float) -> float:
        """Wait until these ranks have ended; return how long it took.

        Raises:
            AssertionError: if they have not after so many seconds.
        """
        began = time.monotonic()
        for rank in ranks:
            left = seconds - (time.monotonic() - began)
            try:
                self.processes[rank].wait(max(0.1, left))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} goes on after {seconds} s:\n{self.said()}") from None
        return time.monotonic() - began

    def codes(self, ranks: Sequence[int]) -> list[int | None]:
        return [self.processes[rank].poll() for rank in ranks]


def _have_store(pipe: Connection) -> None:
    store = serve(LOOPBACK, 0, clients=None, timeout_s=60)
    pipe.send(store.port)
    while True:
        signal.pause()


@contextmanager
def launched(
    world_size: int, arguments: Sequence[str], folder: Path, *, ranks_per_node: int | None = None
) -> Iterator[Started]:
    """Start `python ARGUMENTS` as every rank of a run, and end what is left of them.

    Args:
        world_size: ranks, all on this machine.
        arguments: of python.
        folder: to run in; gets stdout.RANK and stderr.RANK.
        ranks_per_node: what they believe, if not that they are all on one.
    """
    here, there = multiprocessing.Pipe()
    store = warm.CONTEXT.Process(target=_have_store, args=(there,), daemon=True)
    store.start()
    port = str(here.recv())
    processes, errors = [], []
    for rank in range(world_size):
        environment = {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": port,
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node or world_size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % (ranks_per_node or world_size)),
        }
        errors.append(folder / f"stderr.{rank}")
        processes.append(
            warm.Process(
                arguments, cwd=folder, stdout=folder / f"stdout.{rank}", stderr=errors[-1], environment=environment
            )
        )
    try:
        yield Started(processes, errors, store)
    finally:
        store.kill()
        store.join()
        for process in processes:
            process.kill()
