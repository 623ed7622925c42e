"""Read what each rank of a run last said of itself, and judge whether it still lives. Imports no torch."""

import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter

from trainer.atomic_io import open_regular
from trainer.status import NAME_PATTERN, Status

Life = Literal["ended", "alive", "gone", "elsewhere"]
"""Of a rank's process: it wrote its end; is there; is not there, without an end; is on another machine."""

_MAX_BYTES: Final = 1 << 16
_START_SLACK_S: Final = 2.0  # a process is older than the time of its first status
_SILENT_S: Final = 15.0
_SILENT_STEPS: Final = 5
_WRITTEN_EVERY_S: Final = 1.0
_SCHEMA: Final = TypeAdapter(Status)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """Last status of a rank, and whether its process lives."""

    status: Status
    life: Life
    age_s: float
    """Seconds since it was written, by this machine's clock."""

    @property
    def name(self) -> str:
        """Rank, process and host, such as `rank 1 (pid 123 on node7)`."""
        return f"rank {self.status.rank} (pid {self.status.pid} on {self.status.host})"

    def has_ended_in(self, owner: str) -> bool:
        """Return whether it ended in the process that still holds the lock, as one does that trains in a notebook."""
        return self.life == "ended" and owner == f"{self.status.host} process {self.status.pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatuses:
    """The ranks of a run's last start, in order, and the files that say nothing."""

    ranks: Sequence[RankStatus] = ()
    damaged: Sequence[str] = ()
    """Names of the status files that cannot be read."""

    def troubled(self, *, step_s: float | None) -> list[str]:
        """Name the ranks of a running run that are gone, silent or behind, each with what is known of it.

        A status is written once a second at most, so a rank may seem some steps behind without being so; `step_s` is
        the time of a step.
        """
        newest = max((rank.status.step for rank in self.ranks), default=0)
        slack = 1 + math.ceil(2 * _WRITTEN_EVERY_S / step_s) if step_s else 1
        silence_s = max(_SILENT_S, _SILENT_STEPS * (step_s or 0))
        return [said for rank in self.ranks if (said := _trouble(rank, newest, slack, silence_s)) is not None]


def read_rank_statuses(folder: Path) -> RankStatuses:
    """Read the status files of the newest start of a run; those of earlier attempts and foreign files are left out."""
    found, damaged = list[RankStatus](), list[str]()
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if NAME_PATTERN.fullmatch(path.name):
                status = _read(path)
                if status is None:
                    damaged.append(path.name)
                else:
                    found.append(RankStatus(status=status, life=_life(status), age_s=time.time() - status.updated))
    newest = min(found, key=lambda rank: rank.age_s, default=None)
    ranks = [rank for rank in found if newest is not None and rank.status.attempt == newest.status.attempt]
    return RankStatuses(ranks=sorted(ranks, key=lambda rank: rank.status.rank), damaged=damaged)


def _read(path: Path) -> Status | None:
    """Return the status in a file; None if it is damaged."""
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), encoding="utf-8") as file:
            status = _SCHEMA.validate_json(file.read(_MAX_BYTES), strict=True)
    except (OSError, ValueError):  # pydantic's errors are ValueErrors
        return None
    is_sane = status.rank >= 0 and status.pid > 0 and status.step >= 0 and math.isfinite(status.updated)
    return status if is_sane and math.isfinite(status.started) else None


def _life(status: Status) -> Life:
    if status.state == "ended":
        return "ended"
    if status.host != socket.gethostname():
        return "elsewhere"
    import psutil

    try:
        process = psutil.Process(status.pid)
        # The number of a dead process may have been given to a younger one.
        is_it = process.create_time() <= status.started + _START_SLACK_S
        return "alive" if is_it and process.status() != psutil.STATUS_ZOMBIE else "gone"
    except (psutil.NoSuchProcess, OverflowError, ValueError):
        return "gone"
    except psutil.Error:  # not permitted to look: it is there
        return "alive"


def _trouble(rank: RankStatus, newest: int, slack: int, silence_s: float) -> str | None:
    status = rank.status
    if rank.life == "gone":
        return f"{rank.name} is gone: it ended in step {status.step} without saying why"
    if rank.life == "ended" and status.exit_code:
        why = "" if status.error is None else f": {status.error}"
        return f"{rank.name} ended with exit code {status.exit_code}{why}"
    if rank.life == "ended":
        return None
    if status.step and status.step < newest - slack:
        return f"{rank.name} is behind: in step {status.step}, others are in {newest}"
    if status.phase == "training" and rank.age_s > silence_s:
        return f"{rank.name} is silent for {rank.age_s:.0f} s, in step {status.step}"
    return None
