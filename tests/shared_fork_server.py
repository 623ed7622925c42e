"""One server of forks for all workers of pytest-xdist: it imports in ten seconds what each would import again.

pytest's first process starts it, with all that tests/imported_once.py preloads; its workers are told where it is.
"""

import os
from collections.abc import Mapping
from multiprocessing import forkserver
from typing import Any

_SERVER: Any = getattr(forkserver, "_forkserver")  # noqa: B009 - it has no public name
_OF_THE_SERVER = {"_forkserver_address", "_forkserver_authkey"}
"""Attributes by which a process finds it."""


def start() -> dict[str, Any]:
    """Start the server unless it runs already or another process has it, and return where it is."""
    _SERVER.ensure_running()
    return {name: value for name, value in vars(_SERVER).items() if name in _OF_THE_SERVER}


def adopt(server: Mapping[str, Any]) -> None:
    """Use the server of another process, which ends it, and never start one."""
    vars(_SERVER).update(server, ensure_running=lambda: None)
    if _SERVER._forkserver_alive_fd is None:  # each fork is handed it, to know when the server's owner has ended
        _, _SERVER._forkserver_alive_fd = os.pipe()
