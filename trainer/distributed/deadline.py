"""Exit a process that waits for ever, as torch's store client may despite its timeout. Imports no torch."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.terminal import print_safe


@contextmanager
def exit_after(seconds: float, message: str, exit_code: int) -> Iterator[None]:
    """Run a block; if it takes longer than `seconds`, print a message and exit the process."""
    timer = threading.Timer(seconds, exit_now, [message, exit_code])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def exit_now(message: str | None, exit_code: int) -> None:
    """Exit the process without cleaning up, after printing a message unless it is None."""
    if message is not None:
        print_safe(message, file=sys.stderr)
    os._exit(exit_code)
