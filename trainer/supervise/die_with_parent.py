"""Processes that end with the one that started them, however that ends. On Linux; elsewhere nothing happens."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from trainer.distributed.process import is_alive
from trainer.environment import SUPERVISOR

_PR_SET_PDEATHSIG = 1
_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}
"""Variables that torchrun and DeepSpeed's launcher set, each one of its own."""


def end_with(parent: int) -> Callable[[], None]:
    """Return what a new process must call to be killed when its parent ends; made before the process is.

    Args:
        parent: process id; if the caller is not its child (any more), the call kills at once.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def bind() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    return bind


def end_with_launcher() -> None:
    """Bind a rank to torchrun, DeepSpeed's launcher or the supervisor, if one of them has started it."""
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is None and not _LAUNCHERS & os.environ.keys():
        return
    end_with(os.getppid())()
    if supervisor is not None and not is_alive(int(supervisor)):  # it ended, and torchrun, before this rank was bound
        os.kill(os.getpid(), signal.SIGKILL)
