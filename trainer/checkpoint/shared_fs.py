"""Check that every rank sees rank 0's run folder, before anything is computed that could not be saved."""

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
"""A network file system may show a file to other nodes so much later."""


def check_shared(folder: RunFolder, group: Group) -> None:
    """Let every rank look for what rank 0 has just written into the run folder; every rank must call it.

    Raises:
        ConfigError: if one does not see it, in other words has another folder of the same name.
    """
    if group.size == 1:
        return
    sign, token, is_first = folder.path / ".start", uuid4().hex, group.index == 0
    try:
        with raise_together(group):
            if is_first:
                folder.path.mkdir(parents=True, exist_ok=True)
                folder.write(sign, token, is_passing=True)
        here, host = folder.path.absolute(), socket.gethostname()
        token, there, first_host = group.all_gather_objects((token, str(here), host) if is_first else None)[0]
        with raise_together(group):
            if not is_first and not _appears(sign, token):
                raise ConfigError(
                    f"runs_dir: {here} on host {host} is not the folder that rank 0 writes into, {there} on host "
                    f"{first_host}; use a folder on a file system that all nodes share"
                )
    finally:
        if is_first:
            with contextlib.suppress(OSError):
                sign.unlink(missing_ok=True)


def _appears(sign: Path, token: str) -> bool:
    """Wait until a file says the token; tell whether it came to that."""
    end = time.monotonic() + VISIBLE_S
    while not _says(sign, token):
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True


def _says(sign: Path, token: str) -> bool:
    """Tell whether a file is there and begins with the token, whatever else may have its name on another host."""
    try:
        with os.fdopen(open_regular(sign, os.O_RDONLY), "rb") as file:
            return file.read(len(token)) == token.encode()
    except OSError:
        return False
