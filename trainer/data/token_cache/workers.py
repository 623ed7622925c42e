"""Parallel ingestion: a pool of processes that ends with the process that started it."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from trainer.data.token_cache.read_tasks import ReadTask
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import ResourceError, TurnoutError

_MIN_PROCESS_BYTES = 24 << 20  # least bytes for another process to pay off: it takes about a second to start
_REPORT_BYTES = 1 << 20  # bytes of text between two updates of the progress
_POLL_S = 0.2

# State of a pool process: the tokenizer, too large to be sent with each task, and the shared count of bytes done.
_tokenizer: Tokenizer | None = None
_done_bytes: Any = None


def run_tasks(
    tasks: Sequence[ReadTask], tokenizer: Tokenizer, max_processes: int, advance: Callable[[int], None]
) -> None:
    """Run all tasks, in this process if there is too little text for several.

    `advance` is called with the bytes of text that all tasks together have done. Raises the first error of a task and
    stops the others, or ResourceError if a process was killed.
    """
    num_processes = min(max_processes, len(tasks), sum(task.size_bytes for task in tasks) // _MIN_PROCESS_BYTES)
    if num_processes >= 2:
        _run_in_pool(tasks, tokenizer, num_processes, advance)
        return
    done_bytes = 0

    def report(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        advance(done_bytes)

    for task in tasks:
        task.run(tokenizer, _in_steps(report))


def _run_in_pool(
    tasks: Sequence[ReadTask], tokenizer: Tokenizer, num_processes: int, advance: Callable[[int], None]
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    done_bytes = context.Value("q")
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_start_process, initargs=(tokenizer, done_bytes)
    )
    processes: list[BaseProcess] = []
    try:
        futures = {executor.submit(_run_task, task) for task in tasks}
        processes = [process for process in multiprocessing.active_children() if process not in others]
        while futures:
            done, futures = wait(futures, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            advance(done_bytes.value)
    except BrokenProcessPool:
        executor.shutdown()
        # The executor has terminated the processes that outlived the first one.
        codes = [code for process in processes if (code := process.exitcode) and code != -signal.SIGTERM]
        code = codes[0] if codes else -signal.SIGTERM
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        message = f"data: a process that read text {how}; was it out of memory? Finished parts are kept: start again"
        raise ResourceError(message) from None
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start_process(tokenizer: Tokenizer, done_bytes: Any) -> None:
    global _tokenizer, _done_bytes
    _tokenizer, _done_bytes = tokenizer, done_bytes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_task(task: ReadTask) -> None:
    assert _tokenizer is not None, "_start_process has run"

    def report(num_bytes: int) -> None:
        with _done_bytes.get_lock():
            _done_bytes.value += num_bytes

    try:
        task.run(_tokenizer, _in_steps(report))
    except (TurnoutError, OSError):
        raise
    except Exception as error:  # of a library: it may not be picklable
        raise RuntimeError("".join(traceback.format_exception(error))) from None


def _in_steps(report: Callable[[int], None]) -> Callable[[int], None]:
    """Return a function that adds up bytes and reports them about every megabyte."""
    waiting = 0

    def advance(num_bytes: int) -> None:
        nonlocal waiting
        waiting += num_bytes
        if waiting >= _REPORT_BYTES:
            report(waiting)
            waiting = 0

    return advance


def end_with_parent() -> None:
    """Wait for the parent process to end, and then end this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a child"
    connection.wait([parent.sentinel])
    os._exit(1)
