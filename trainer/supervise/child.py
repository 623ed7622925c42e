"""Child process of a supervisor: the only rank, or torchrun."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.status import ATTEMPT, REPORT
from trainer.supervise.die_with_parent import end_with

_LEFTOVERS_S = 10.0


class Child:
    """A process in a process group of its own, so that Ctrl-C reaches it once, through the supervisor."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it; `environment` has the name of the attempt."""
        self._attempt = environment[ATTEMPT]
        self._reports, reports = os.pipe()
        os.set_blocking(self._reports, False)
        self._process = subprocess.Popen(
            command,
            env={**environment, REPORT: str(reports)},
            stdin=subprocess.DEVNULL,
            pass_fds=[reports],
            process_group=0,
            preexec_fn=end_with(os.getpid()),
        )
        os.close(reports)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def request_stop(self) -> None:
        """Send SIGTERM; torchrun forwards it to its ranks."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill the process group; torchrun's ranks have their own groups, but die with their parent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> dict[str, Any]:
        """After the process has ended, kill the rest of the attempt; return torchrun's report, possibly empty."""
        with os.fdopen(self._reports, "rb") as file:
            text = file.read()
        end = time.monotonic() + _LEFTOVERS_S
        while _kill_all(self._attempt) and time.monotonic() < end:
            time.sleep(0.05)
        try:
            return json.loads(text or b"{}")
        except ValueError:  # killed while it wrote the report
            return {}


def _kill_all(attempt: str) -> int:
    """Kill all processes with the attempt's name in their environment; return their number."""
    mark, found = f"{ATTEMPT}={attempt}".encode(), 0
    for folder in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                found += 1
    return found
