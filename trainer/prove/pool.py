"""Local ranks: processes that start once and run one function after another together."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer.distributed.interface import use_loopback
from trainer.errors import TurnoutError

_GRACE_S = 5.0
PRELOAD = ("trainer.prove.run_case", "torch.distributed.fsdp", "torch._dynamo")
"""Imported once, by the server process that all ranks are forked from. The others are for sharded weights."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*PRELOAD])


@dataclass(frozen=True, slots=True)
class Failure:
    """Failure of a rank."""

    error: TurnoutError | None
    """None for other exceptions and for a lost rank."""
    text: str
    """Traceback; empty for a lost rank."""

    @property
    def is_lost(self) -> bool:
        """Whether the process died or did not answer in time."""
        return self.error is None and not self.text


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


class LocalRanks:
    """Runs functions on ranks 0 .. n - 1 of a new gloo group each, in processes that are reused."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        # Files of the groups' stores. They stay as long as the processes: one dies if it frees a group while the file
        # is being removed.
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_runs = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        """Run `function(*args)` on each rank; return each rank's result or `Failure`.

        The function is module-level; torch's default group is initialised. Without a failure there is no deadline: a
        rank that waits for a lost one gives up after `timeout_s`. After a failure the processes are replaced.
        """
        while len(self._workers) < world_size:
            parent_end, child_end = multiprocessing.Pipe()
            process = _CONTEXT.Process(target=_work, args=(child_end,), daemon=True)
            process.start()
            child_end.close()
            self._workers.append(_Worker(process, parent_end))
        workers = self._workers[:world_size]
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        store, self._num_runs = str(Path(self._folder.name) / f"store_{self._num_runs}"), self._num_runs + 1
        for rank, worker in enumerate(workers):
            with suppress(OSError):  # it died: _receive reports it
                worker.pipe.send((function, args, rank, world_size, store, timeout_s))
        answers = _receive([worker.pipe for worker in workers], timeout_s)
        if any(isinstance(answer, Failure) for answer in answers):
            self.close()
        return answers

    def close(self) -> None:
        """Kill the processes."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _receive(pipes: list[Connection], timeout_s: float) -> list[Any]:
    answers: list[Any] = [Failure(None, "")] * len(pipes)
    missing = dict(enumerate(pipes))
    has_failed = False
    while missing:
        ready = wait(list(missing.values()), timeout=timeout_s + _GRACE_S if has_failed else None)
        if not ready:
            break
        for rank, pipe in list(missing.items()):
            if pipe in ready:
                del missing[rank]
                with suppress(EOFError, OSError):  # it died
                    answers[rank] = pipe.recv()
                has_failed = has_failed or isinstance(answers[rank], Failure)
    return answers


def _join(path: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Create torch's default group through a store in a file."""
    store = dist.FileStore(path, world_size)
    store.set_timeout(timeout)  # its own are 5 minutes, in which it looks for a file or a key that never comes
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    use_loopback()
    with suppress(EOFError):
        while True:
            function, args, rank, world_size, store, timeout_s = pipe.recv()
            try:
                _join(store, rank, world_size, timedelta(seconds=timeout_s))
                answer = function(*args)
                dist.barrier()  # no rank leaves while others are still connecting
            except TurnoutError as error:
                answer = Failure(error, traceback.format_exc())
            except BaseException:
                answer = Failure(None, traceback.format_exc())
            # Pickled by value: torch's reducers share memory of a process that may exit.
            pipe.send_bytes(pickle.dumps(answer))
            if dist.is_initialized():
                dist.destroy_process_group()
