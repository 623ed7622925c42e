"""Processes of this machine, by number. Imports no torch."""

import os
import socket
from pathlib import Path


def home() -> str:
    """Return where process numbers mean what they mean here: this machine, and this container on it."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def is_alive(pid: int) -> bool:
    """Tell whether there is a process of this number, running or not yet waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
