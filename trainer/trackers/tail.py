"""Follow a run from another process: new lines of its files, the position so far, the run's end."""

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_LAST_CHANCE_S = 60.0
"""A process ends so long after its run at the latest, which may have been killed; who waits for it is less patient."""
_UNSAFE_S = 20.0
"""Longest time until what was handed on is on the disk, in seconds."""


class EndOfRun:
    """Waits for the end of the run, on a thread of its own; this process does not outlive it for long."""

    def __init__(self) -> None:
        self.has_come = threading.Event()
        self.exit_code = 1
        """Of the run, which says it on standard input; 1 if it was killed."""
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        line = sys.stdin.readline().strip()
        self.exit_code = int(line) if line else 1
        self.has_come.set()
        time.sleep(_LAST_CHANCE_S)
        os._exit(1)


class Tail:
    """The lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the records that are whole by now, each once; none of a file that somebody has just removed."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._at)
            while (line := file.readline()).endswith(b"\n"):
                self._at = file.tell()
                yield json.loads(line)


class Position:
    """The step up to which records were handed on and are safe, in a file."""

    def __init__(self, path: Path, run_id: str) -> None:
        self._path, self._run_id = path, run_id
        self._unsafe: deque[tuple[float, int]] = deque()

    def read(self) -> int:
        """Return the step; -1 where nothing is known of this run."""
        try:
            found = json.loads(self._path.read_text())
            return int(found["step"]) if found["run_id"] == self._run_id else -1
        except (OSError, ValueError, KeyError, TypeError):
            return -1

    def handed_on(self, step: int) -> None:
        """Note that a record of this step was, and write down what is safe by now."""
        now, safe = time.monotonic(), None
        self._unsafe.append((now, step))
        while now - self._unsafe[0][0] > _UNSAFE_S:
            safe = self._unsafe.popleft()[1]
        if safe is not None:
            self._write(safe)

    def settle(self) -> None:
        """Write down that all of it is safe."""
        if self._unsafe:
            self._write(self._unsafe[-1][1])

    def _write(self, step: int) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)  # of a killed mirror, perhaps shared with a snapshot
        with temporary.open("x") as file:
            file.write(json.dumps({"run_id": self._run_id, "step": step}))
        temporary.replace(self._path)
