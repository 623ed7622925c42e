"""Status files of the ranks in the run folder, for the supervisor and users. Imports no torch.

    runs/NAME/status/rank00000.json

Replaced atomically about once a second, but not flushed to disk: after a power failure it is of no use.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from trainer.errors import StopRequested, TurnoutError, exit_code_of

ATTEMPT = "TURNOUT_ATTEMPT"
"""Environment variable: name of the attempt, by which a supervisor recognises the ranks it started."""
REPORT = "TURNOUT_REPORT"
"""Environment variable: descriptor of the pipe to which torchrun reports failed ranks."""
LIVENESS_FOLDER = "TURNOUT_WATCHED"
"""Environment variable: temporary folder shared by a supervisor and its processes."""
LIVENESS_PIPE, STOP_SIGNAL = "beats", "asked"
"""Files in it: the pipe of liveness messages; the name of the stop signal."""
Phase = Literal["start-up", "training", "reading", "evaluating", "saving", "reporting"]

NAME_PATTERN = re.compile(r"rank\d{5,18}\.json", re.ASCII)
"""Name of a status file."""
_INTERVAL_S = 1.0


@dataclass(slots=True, kw_only=True)
class Status:
    """Status of one rank."""

    attempt: str
    """Attempt of the supervisor; empty without one."""
    rank: int
    host: str
    pid: int
    step: int = 0
    """Current step, from 1; 0 before the first."""
    rows: Sequence[int] | None = None
    """First and last row (sample id) of the step, over all ranks."""
    phase: Phase = "start-up"
    experts_kernel: str = ""
    """Kernel of the experts; empty before it is chosen."""
    state: Literal["running", "ended"] = "running"
    exit_code: int | None = None
    error: str | None = None
    started: float = 0.0
    updated: float = 0.0


class StatusFile:
    """Writes one rank's status. Disk errors are ignored, so that they never stop training."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        """Prepare; nothing is written before the first `enter`, since the folder may still belong to another run."""
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
        """Begin a phase of the run."""
        self.status.phase = phase
        self._write()

    def begin_step(self, step: int, *, first_row: int, num_rows: int) -> None:
        """Begin a step; written at most once a second. The numbers of rows are over all ranks."""
        self.status.step, self.status.rows = step, [first_row, first_row + num_rows - 1]
        is_new, self.status.phase = self.status.phase != "training", "training"
        if is_new or self._written is None or time.monotonic() - self._written >= _INTERVAL_S:
            self._write()

    def end(self, exit_code: int, error: str | None = None) -> None:
        """Write the end of the rank, with the first line of the error if any, unless it has written nothing yet."""
        if self._written is not None:
            self.status.state, self.status.exit_code = "ended", exit_code
            self.status.error = error.splitlines()[0] if error else None
            self._write()

    @contextlib.contextmanager
    def end_on_error(self) -> Iterator[None]:
        """Write the end of the rank if an error leaves the block."""
        try:
            yield
        except BaseException as error:
            is_expected = isinstance(error, TurnoutError | StopRequested)
            code = exit_code_of(error)
            self.end(1 if code is None else code, str(error) if is_expected else f"{type(error).__name__}: {error}")
            raise

    def _write(self) -> None:
        self._written, self.status.updated = time.monotonic(), time.time()
        temporary = self.path.with_name(f".{self.path.name}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # left by a killed run: maybe a hard link of a snapshot, or not a file
            with temporary.open("x") as file:
                file.write(json.dumps(asdict(self.status)) + "\n")
            temporary.replace(self.path)


def read_statuses(folder: Path, attempt: str) -> dict[int, Status]:
    """Return the last status of each rank of one attempt; other attempts are ignored."""
    statuses = {}
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # gone, or malformed
                record = json.loads(path.read_text()) if NAME_PATTERN.fullmatch(path.name) else {}
                status = Status(**{field.name: record[field.name] for field in fields(Status)})
                if status.attempt == attempt:
                    statuses[status.rank] = status
    return statuses


def remove_others(folder: Path, *, world_size: int) -> None:
    """Remove the status files of ranks that do not exist in a run of `world_size` ranks."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if NAME_PATTERN.fullmatch(path.name) and int(path.stem.removeprefix("rank")) >= world_size:
                path.unlink()
