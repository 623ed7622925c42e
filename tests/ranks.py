"""Several gloo processes for one test: started once, given functions to run together, killed when they hang."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

MOST = 4
TIMEOUT_S = 120.0


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Ranks:
    """Runs a function on ranks 0 .. n - 1 of a fresh process group, in processes that stay for the next one."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what `function(mesh_or_layout_args...)` returned on each rank.

        Raises:
            AssertionError: with the traceback of each rank that failed, or if they did not end in time.
        """
        while len(self._workers) < world_size:
            self._workers.append(_start())
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(workers):
                worker.pipe.send((function, args, rank, world_size, str(Path(folder) / "store")))
            answers: list[Any] = [None] * world_size
            missing = set(range(world_size))
            while missing:
                ready = wait([workers[rank].pipe for rank in missing], timeout=TIMEOUT_S)
                if not ready:
                    self.close()
                    raise AssertionError(f"ranks {sorted(missing)} of {world_size} hang in {function.__name__}")
                for rank in sorted(missing):
                    if workers[rank].pipe in ready:
                        try:
                            answers[rank] = workers[rank].pipe.recv()
                        except EOFError:
                            answers[rank] = ("error", "the process died")
                        missing.discard(rank)
        errors = [f"rank {rank}:\n{value}" for rank, (kind, value) in enumerate(answers) if kind == "error"]
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        self._workers = []


def _start() -> _Worker:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(there,), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _work(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with suppress(EOFError):
        while True:
            function, args, rank, world_size, store = pipe.recv()
            try:
                dist.init_process_group(
                    "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
                )
                answer = ("done", function(*args))
            except BaseException:
                answer = ("error", traceback.format_exc())
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            pipe.send(answer)
