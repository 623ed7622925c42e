"""This process's signs of life, a line a second into a pipe that its supervisor reads. Imports no torch."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from trainer.status import LIVENESS_FOLDER, LIVENESS_PIPE, StatusFile

_BEAT_S = 1.0
_LEAST_WORK_S = 0.01
"""Least CPU time since the last sign of life: a process that has used less, however busy the machine, is stuck."""


def start_liveness_thread(name: str, status: StatusFile | None = None) -> None:
    """Write signs of life from now on, if a supervisor listens.

    Args:
        name: rank, or what this process is.
        status: of the only rank of a run, which nobody else waits for: in the middle of a step, computing nothing is no
            sign of life either.
    """
    folder = os.environ.get(LIVENESS_FOLDER)
    if folder is not None:
        threading.Thread(
            target=_show, args=(Path(folder) / LIVENESS_PIPE, name, status), name="life", daemon=True
        ).start()


class CpuProgress:
    """Tells whether the only rank of a run goes on. With other ranks there is nothing to tell: these look after it."""

    def __init__(self, status: StatusFile | None) -> None:
        """Begin to look.

        Args:
            status: of the only rank; None where there are others.
        """
        self._status = status
        self._step, self._worked_s = self._step_now(), _worked_s()

    def is_made(self) -> bool:
        """Tell whether anything was done since it last was, or nothing need be: reading and saving may wait."""
        step, worked_s = self._step_now(), _worked_s()
        is_made = step is None or step != self._step or worked_s - self._worked_s > _LEAST_WORK_S
        if is_made:
            self._step, self._worked_s = step, worked_s
        return is_made

    def _step_now(self) -> int | None:
        """Return the step that is being taken; None between steps."""
        if self._status is None or self._status.status.phase != "training" or self._status.status.state == "ended":
            return None
        return self._status.status.step


def _worked_s() -> float:
    """Return the time that this process has computed for, but for the thread that asks."""
    return time.process_time() - time.thread_time()


def _show(path: Path, name: str, status: StatusFile | None) -> None:
    try:
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # the supervisor has gone
        return
    progress = CpuProgress(status)
    with suppress(BrokenPipeError):  # it has gone now
        while True:
            with suppress(BlockingIOError):  # it is stopped, and has not read for an hour
                os.write(pipe, f"{name}\n".encode())
            time.sleep(_BEAT_S)
            while not progress.is_made():
                time.sleep(_BEAT_S)
    os.close(pipe)
