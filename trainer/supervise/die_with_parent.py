"""Kill a process when its parent ends, however that ends. Linux only; a no-op elsewhere."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from trainer.distributed.process import is_alive
from trainer.environment import SUPERVISOR

_PR_SET_PDEATHSIG = 1
_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}
"""A variable that torchrun sets, and one that DeepSpeed's launcher sets."""


def end_with(parent: int) -> Callable[[], None]:
    """Return a function that a new process must call in order to be killed when its parent ends.

    Args:
        parent: process id; if the caller is not its child any more, the call kills at once.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def bind() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    return bind


def end_with_launcher() -> None:
    """Let this rank be killed when torchrun, DeepSpeed's launcher or the supervisor that started it ends."""
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is None and not _LAUNCHERS & os.environ.keys():
        return
    end_with(os.getppid())()
    if supervisor is not None and not is_alive(int(supervisor)):  # it and torchrun ended before this call
        os.kill(os.getpid(), signal.SIGKILL)
