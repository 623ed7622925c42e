"""Liveness of a supervisor's processes, from the messages that each writes into a pipe once a second.

    $TMPDIR/turnout-XXXX/beats    named pipe, written by `distributed/liveness_pipe.py`; "0" is a message of rank 0
                         asked    name of the stop signal that the supervisor received

Not in the run folder, so that a full or slow disk does not look like a frozen rank.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from trainer.status import LIVENESS_FOLDER, LIVENESS_PIPE, STOP_SIGNAL

_MAX_POLL_S = 1.0  # a longer time between two polls is not counted as silence: the supervisor or the host was suspended


class LivenessMonitor:
    """Monitors the processes of one attempt."""

    def __init__(self, first: str) -> None:
        """Create the pipe. If the system cannot, no process, not even the `first`, ever counts as silent."""
        self.environment: dict[str, str] = {}
        self._folder: Path | None = None
        self._pipe: int | None = None
        self._silence_s = {first: 0.0}
        self._polled_at = time.monotonic()
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="turnout-"))  # readable by this user only
            self._folder, self.environment = folder, {LIVENESS_FOLDER: str(folder)}
            os.mkfifo(folder / LIVENESS_PIPE)
            # Opened for writing too, so that there is no end of file when the last writer exits.
            self._pipe = os.open(folder / LIVENESS_PIPE, os.O_RDWR | os.O_NONBLOCK)

    def poll(self) -> None:
        """Read the messages since the last call; call it often."""
        if self._pipe is None:
            return
        now = time.monotonic()
        passed, self._polled_at = min(now - self._polled_at, _MAX_POLL_S), now
        for name in self._silence_s:
            self._silence_s[name] += passed
        with contextlib.suppress(BlockingIOError):
            while text := os.read(self._pipe, 1 << 16):
                self._silence_s |= dict.fromkeys(text.decode(errors="replace").split(), 0.0)

    def silent(self, limit_s: float) -> list[str]:
        """Return the processes without a message for longer than this: the first one and any that sent one before."""
        return [name for name, silence_s in self._silence_s.items() if silence_s > limit_s]

    def record_stop_signal(self, signal_name: str) -> None:
        """Record the signal for the processes that are about to receive SIGTERM."""
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
