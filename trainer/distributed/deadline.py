"""An end to waiting for what may never come back, as torch's client of a store does whatever its timeout. No torch."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.terminal import print_safe


@contextmanager
def exit_after(seconds: float, message: str, exit_code: int) -> Iterator[None]:
    """Run a block, and if it is not through in time, print a message and end the process, whatever it still waits for.

    Args:
        seconds: how long it may take.
        message: what is wrong then.
        exit_code: of the process.
    """
    timer = threading.Timer(seconds, exit_now, [message, exit_code])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def exit_now(message: str | None, exit_code: int) -> None:
    """End the process without waiting for anything of it, after a last message if there is one."""
    if message is not None:
        print_safe(message, file=sys.stderr)
    os._exit(exit_code)
