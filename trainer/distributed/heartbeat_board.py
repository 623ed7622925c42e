"""Heartbeats of the ranks of one node, in a file that they share, so that one of them publishes those of all.

    | published | heartbeat of the node's rank 0 | of rank 1 | ...      slots of 4096 bytes, ended by zeros

`published` is the time of the last publication, by the clock of the node, which all of its processes share. Whichever
rank finds that too long ago publishes: nobody has to notice that another one no longer does. The file loses its name as
soon as all have opened it, and ends with them. Imports no torch.
"""

import contextlib
import json
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

_SLOT = 4096
_TIME = struct.Struct("d")


class HeartbeatBoard:
    """Board of a node with `num_ranks` ranks, of which this one is number `index`; every method may raise OSError."""

    def __init__(self, file: int, *, num_ranks: int, index: int, path: str | None = None) -> None:
        self._file, self._num_ranks, self._index, self._path = file, num_ranks, index, path
        self._last: dict[int, dict[str, Any]] = {}

    @classmethod
    def create(cls, *, num_ranks: int, index: int) -> "HeartbeatBoard":
        """Make a board; `path` is for the others."""
        file, path = tempfile.mkstemp(prefix="turnout-heartbeats-")
        os.posix_fallocate(file, 0, _SLOT * (num_ranks + 1))
        return cls(file, num_ranks=num_ranks, index=index, path=path)

    @classmethod
    def open(cls, path: str, *, num_ranks: int, index: int) -> "HeartbeatBoard":
        """Open the board that another rank of the node has made."""
        return cls(os.open(path, os.O_RDWR), num_ranks=num_ranks, index=index)

    @property
    def path(self) -> str | None:
        """Name of the file, while it has one and this rank has made it."""
        return self._path

    def write(self, heartbeat: str) -> None:
        """Write this rank's heartbeat, unless it is too long: then it is in the store."""
        text = heartbeat.encode()
        if len(text) < _SLOT:
            os.pwrite(self._file, text.ljust(_SLOT, b"\0"), _SLOT * (self._index + 1))

    def read(self) -> dict[int, dict[str, Any]]:
        """Return the last heartbeat of each rank of the node that has written one."""
        for index in range(self._num_ranks):
            text = os.pread(self._file, _SLOT, _SLOT * (index + 1)).partition(b"\0")[0]
            with contextlib.suppress(ValueError):  # empty, or just being written
                self._last[index] = json.loads(text)
        if self._path is not None and len(self._last) == self._num_ranks:
            self.remove_name()
        return self._last

    def is_due(self, interval_s: float) -> bool:
        """Return whether the last publication is longer ago."""
        (published,) = _TIME.unpack(os.pread(self._file, _TIME.size, 0))
        return time.monotonic() - published >= interval_s

    def mark_published(self) -> None:
        """Keep the time of a publication."""
        os.pwrite(self._file, _TIME.pack(time.monotonic()), 0)

    def remove_name(self) -> None:
        """Remove the file's name; those who have opened it keep it."""
        if self._path is not None:
            path, self._path = self._path, None
            Path(path).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        self.remove_name()
        os.close(self._file)
