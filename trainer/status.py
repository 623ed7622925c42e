"""Status files of the ranks in the run folder, for supervisors and people. Imports no torch.

    runs/NAME/status/rank00000.json

Replaced as a whole, about once a second, but not flushed to the disk: it is worth nothing after a power failure.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

ATTEMPT = "TURNOUT_ATTEMPT"
"""Environment variable by which a supervisor tells the ranks it started from all others."""
REPORT = "TURNOUT_REPORT"
"""Environment variable: descriptor on which torchrun tells its supervisor what ended its ranks."""
LIVENESS_FOLDER = "TURNOUT_WATCHED"
"""Environment variable: folder through which a supervisor and its processes hear of each other."""
LIVENESS_PIPE, STOP_SIGNAL = "beats", "asked"
"""Files there: a pipe with signs of life; the signal because of which a run is asked to stop."""
Phase = Literal["start-up", "training", "reading", "evaluating", "saving"]

_NAME = re.compile(r"rank\d{5,}\.json")
_PAUSE_S = 1.0


@dataclass(slots=True, kw_only=True)
class Status:
    """One rank's state."""

    attempt: str
    """Attempt that this rank belongs to; empty without a supervisor."""
    rank: int
    host: str
    pid: int
    step: int = 0
    """The step being taken, from 1; 0 before the first."""
    rows: Sequence[int] | None = None
    """First and last row (sample id) of that step, over all ranks."""
    phase: Phase = "start-up"
    state: Literal["running", "ended"] = "running"
    exit_code: int | None = None
    """Exit code of a rank that has ended."""
    error: str | None = None
    """First line of what ended it."""
    started: float = 0.0
    """Unix time, in seconds."""
    updated: float = 0.0
    """Unix time of this record, in seconds."""


class StatusFile:
    """Writes one rank's status. A disk that refuses does not stop training: the file then says what it said before."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        """Prepare; nothing is written before `enter`, since the folder may be another run's.

        Args:
            folder: for the files of all ranks.
            rank: this one.
        """
        self.path = folder / f"rank{rank:05d}.json"
        self.status = Status(
            attempt=os.environ.get(ATTEMPT, ""),
            rank=rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=time.time(),
        )
        self._written: float | None = None

    def enter(self, phase: Phase) -> None:
        """Note that another part of the run begins."""
        self.status.phase = phase
        self._write()

    def begin_step(self, step: int, *, first_row: int, num_rows: int) -> None:
        """Note that a step begins; written at most once a second.

        Args:
            step: from 1.
            first_row: number of its first row in the whole run.
            num_rows: rows of the step, over all ranks.
        """
        self.status.step, self.status.rows = step, [first_row, first_row + num_rows - 1]
        is_new, self.status.phase = self.status.phase != "training", "training"
        if is_new or self._written is None or time.monotonic() - self._written >= _PAUSE_S:
            self._write()

    def end(self, exit_code: int, error: str | None = None) -> None:
        """Note the end, unless this rank has written nothing yet.

        Args:
            exit_code: of the process.
            error: what ended it; its first line is kept.
        """
        if self._written is not None:
            self.status.state, self.status.exit_code = "ended", exit_code
            self.status.error = error.splitlines()[0] if error else None
            self._write()

    def _write(self) -> None:
        self._written, self.status.updated = time.monotonic(), time.time()
        temporary = self.path.with_name(f".{self.path.name}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # of a killed run, perhaps shared with a snapshot; or no file at all
            with temporary.open("x") as file:
                file.write(json.dumps(asdict(self.status)) + "\n")
            temporary.replace(self.path)


def read_statuses(folder: Path, attempt: str) -> dict[int, Status]:
    """Return what the ranks of one attempt wrote last, by rank; those of other attempts are left out."""
    statuses = {}
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            status = _read(path) if _NAME.fullmatch(path.name) else None
            if status is not None and status.attempt == attempt:
                statuses[status.rank] = status
    return statuses


def remove_others(folder: Path, *, world_size: int) -> None:
    """Remove what ranks wrote that a run with fewer of them no longer has.

    Args:
        folder: with the files of all ranks.
        world_size: ranks that there are.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name) and int(path.stem.removeprefix("rank")) >= world_size:
                path.unlink()


def _read(path: Path) -> Status | None:
    """Return a status; None if the file has gone or is not one."""
    try:
        record = json.loads(path.read_text())
        return Status(**{field.name: record[field.name] for field in fields(Status)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
