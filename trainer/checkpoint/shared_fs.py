"""Check that every rank sees rank 0's run folder, before computing anything that could not be saved."""

import contextlib
import os
import socket
import time
from pathlib import Path
from uuid import uuid4

from trainer.atomic_io import open_regular
from trainer.checkpoint.run_folder import RunFolder
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.collectives import Group
from trainer.errors import ConfigError

VISIBLE_S = 30.0
"""Longest delay until a network file system shows a new file to other nodes, in seconds."""


def check_shared(folder: RunFolder, group: Group) -> None:
    """Let every rank look for a file that rank 0 has just written into the run folder; collective.

    Raises:
        ConfigError: if a rank does not see it, so its folder is a different one of the same name.
    """
    if group.size == 1:
        return
    marker, token, is_first = folder.path / ".start", uuid4().hex, group.index == 0
    try:
        with raise_together(group):
            if is_first:
                folder.path.mkdir(parents=True, exist_ok=True)
                folder.write(marker, token, is_passing=True)
        here, host = folder.path.absolute(), socket.gethostname()
        token, there, first_host = group.broadcast_object((token, str(here), host))
        with raise_together(group):
            if not is_first and not _appears(marker, token):
                raise ConfigError(
                    f"runs_dir: {here} on host {host} is not the folder that rank 0 writes into, {there} on host "
                    f"{first_host}; use a folder on a file system that all nodes share"
                )
    finally:
        if is_first:
            with contextlib.suppress(OSError):
                marker.unlink(missing_ok=True)


def _appears(marker: Path, token: str) -> bool:
    """Wait until a regular file begins with the token; return False after VISIBLE_S."""
    end = time.monotonic() + VISIBLE_S
    while True:
        with contextlib.suppress(OSError), os.fdopen(open_regular(marker, os.O_RDONLY), "rb") as file:
            if file.read(len(token)) == token.encode():
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
