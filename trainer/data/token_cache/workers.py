"""Work on several parts at once: processes that end with the one that started them, and with its errors."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

from trainer.data.token_cache.read_tasks import ReadTask
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import ResourceError, TurnoutError

_WORTH_BYTES = 24 << 20
"""Least bytes to start another process for: it takes about a second until it reads."""
_REPORT_BYTES = 1 << 20
"""Text between two reports of progress."""


def run_tasks(
    tasks: Sequence[ReadTask], tokenizer: Tokenizer, max_processes: int, advance: Callable[[int], None]
) -> None:
    """Run all tasks; in this process, where others would not be worth their start.

    Args:
        tasks: to be done, in about this order.
        tokenizer: makes the tokens.
        max_processes: at once.
        advance: is told the bytes of text that all tasks together have done.

    Raises:
        DataError: the first that a task raised; the others are stopped.
        ResourceError: if a process was killed.
        OSError: if the cache cannot be written.
    """
    total = _Total(advance)
    worth = sum(task.size_bytes for task in tasks) // _WORTH_BYTES
    num_processes = min(max_processes, len(tasks), worth)
    if num_processes < 2:
        for task in tasks:
            task.run(tokenizer, total.of(task))
        return
    todo = list(reversed(tasks))
    with _processes(num_processes, tokenizer) as workers:
        while workers:
            for worker in [worker for worker in workers if worker.task is None]:
                worker.give(todo.pop() if todo else None)
            ready = wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                if not worker.listen(total):
                    workers.remove(worker)


@dataclass(slots=True, eq=False)
class _Worker:
    """A process that reads one part after another."""

    process: BaseProcess
    pipe: Connection
    task: ReadTask | None = None

    @classmethod
    def start(cls, tokenizer: Tokenizer) -> Self:
        """Start it."""
        context = multiprocessing.get_context("spawn")  # not a copy of this process: it may have threads
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, tokenizer), daemon=True)
        process.start()
        there.close()
        return cls(process, here)

    def give(self, task: ReadTask | None) -> None:
        """Give it something to do; None: it may end."""
        self.task = task
        with suppress(BrokenPipeError):  # it was killed: `listen` will notice
            self.pipe.send(task)

    def listen(self, total: "_Total") -> bool:
        """Take a message: how far it is, that it is done, or what went wrong. Return False once it has ended."""
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            if self.task is not None:
                raise ResourceError(_lost(self.process)) from None
            return False
        if isinstance(message, BaseException):
            raise message
        if message is None:
            self.task = None
        elif self.task is not None:
            total.of(self.task)(message)
        return True


class _Total:
    """The bytes of text that all tasks have done."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._done: dict[Path, int] = {}
        self._total = self._reported = 0

    def of(self, task: ReadTask) -> Callable[[int], None]:
        """Return what is told how far a task is."""

        def update(done_bytes: int) -> None:
            self._total += done_bytes - self._done.get(task.folder, 0)
            self._done[task.folder] = done_bytes
            if self._total - self._reported >= _REPORT_BYTES:
                self._reported = self._total
                self._advance(self._total)

        return update


@contextmanager
def _processes(number: int, tokenizer: Tokenizer) -> Iterator[list[_Worker]]:
    """Start workers; whoever is left in the list at the end is stopped."""
    workers: list[_Worker] = []
    try:
        while len(workers) < number:
            workers.append(_Worker.start(tokenizer))
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _lost(process: BaseProcess) -> str:
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"data: a process that read text {how}; was it memory? Parts that are done are kept: start again"


def _work(pipe: Connection, tokenizer: Tokenizer) -> None:
    """Run the tasks that come, in a process of their own; tell how far each is, when it is done, what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for who started us, and ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        while (task := pipe.recv()) is not None:
            task.run(tokenizer, _Total(pipe.send).of(task))
            pipe.send(None)
    except Exception as error:
        pipe.send(_portable(error))


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a child"
    wait([parent.sentinel])
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent: ours and the system's as they are, others with their traceback as text."""
    if isinstance(error, TurnoutError | OSError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
