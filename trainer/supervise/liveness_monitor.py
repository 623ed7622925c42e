"""Liveness of a supervisor's children: each process writes a line a second (`distributed/liveness_pipe.py`).

    $TMPDIR/turnout-XXXX/beats    a named pipe; "0" is rank 0's sign of life
                         asked    written when a run is to stop: the signal that the supervisor was sent

No part of the run folder: a disk that is full or slow is not a rank that is frozen.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from trainer.status import LIVENESS_FOLDER, LIVENESS_PIPE, STOP_SIGNAL

_LONGEST_LOOK_S = 1.0
"""More time than this between two looks was no silence of theirs: the supervisor itself was stopped, or the machine."""


class LivenessMonitor:
    """Hears the processes of one attempt."""

    def __init__(self, first: str) -> None:
        """Make the pipe; on a system without room for it nobody is heard, and nobody counts as silent.

        Args:
            first: who is started; others are started by it.
        """
        self.environment: dict[str, str] = {}
        """What the processes need to know."""
        self._folder: Path | None = None
        self._pipe: int | None = None
        self._silence_s = {first: 0.0}
        self._looked = time.monotonic()
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="turnout-"))  # for this user alone
            self._folder, self.environment = folder, {LIVENESS_FOLDER: str(folder)}
            os.mkfifo(folder / LIVENESS_PIPE)
            self._pipe = os.open(folder / LIVENESS_PIPE, os.O_RDWR | os.O_NONBLOCK)  # it never ends, though writers do

    def listen(self) -> None:
        """Take note of who was heard since the last call; often."""
        if self._pipe is None:
            return
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _LONGEST_LOOK_S), now
        for name in self._silence_s:
            self._silence_s[name] += passed
        with contextlib.suppress(BlockingIOError):
            while text := os.read(self._pipe, 1 << 16):
                self._silence_s |= dict.fromkeys(text.decode(errors="replace").split(), 0.0)

    def silent(self, limit_s: float) -> list[str]:
        """Return who was not heard for longer than this: who was started, and who was heard before."""
        return [name for name, silence_s in self._silence_s.items() if silence_s > limit_s]

    def ask(self, signal_name: str) -> None:
        """Leave word of why the processes are about to be asked to stop."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / STOP_SIGNAL).write_text(signal_name)

    def close(self) -> None:
        """Remove the pipe."""
        if self._pipe is not None:
            os.close(self._pipe)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._pipe = self._folder = None
