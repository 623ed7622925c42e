"""Write a liveness message per second into the supervisor's pipe. Imports no torch."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from trainer.status import LIVENESS_FOLDER, LIVENESS_PIPE, StatusFile

_INTERVAL_S = 1.0
_MIN_CPU_S = 0.01  # least CPU time per message; a process that has used less, even on a busy host, is stuck


def start_liveness_thread(name: str, status: StatusFile | None = None) -> None:
    """Start to write liveness messages, if this process has a supervisor.

    `name` is the rank of this process, or `torchrun`. `status` is that of the only rank of a run: no other rank would
    notice that it hangs, so its messages also stop if it uses no CPU time in the middle of a step. None for several
    ranks.
    """
    folder = os.environ.get(LIVENESS_FOLDER)
    if folder is not None:
        arguments = Path(folder) / LIVENESS_PIPE, name, status
        threading.Thread(target=_write, args=arguments, name="liveness", daemon=True).start()


class CpuProgress:
    """Detects a hang of the only rank of a run; several ranks, without `status`, detect hangs of each other."""

    def __init__(self, status: StatusFile | None) -> None:
        self._status = status
        self._step, self._cpu_s = self._current_step(), _cpu_s()

    def is_made(self) -> bool:
        """Return whether there was progress since the last True, or the rank is not in a step and may wait for I/O."""
        step, cpu_s = self._current_step(), _cpu_s()
        is_made = step is None or step != self._step or cpu_s - self._cpu_s > _MIN_CPU_S
        if is_made:
            self._step, self._cpu_s = step, cpu_s
        return is_made

    def _current_step(self) -> int | None:
        if self._status is None or self._status.status.phase != "training" or self._status.status.state == "ended":
            return None
        return self._status.status.step


def _cpu_s() -> float:
    """Return the CPU time of this process without that of the calling thread."""
    return time.process_time() - time.thread_time()


def _write(path: Path, name: str, status: StatusFile | None) -> None:
    try:
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # the supervisor has exited
        return
    progress = CpuProgress(status)
    with suppress(BrokenPipeError):  # it has exited meanwhile
        while True:
            with suppress(BlockingIOError):  # the pipe is full: the supervisor is suspended
                os.write(pipe, f"{name}\n".encode())
            time.sleep(_INTERVAL_S)
            while not progress.is_made():
                time.sleep(_INTERVAL_S)
    os.close(pipe)
