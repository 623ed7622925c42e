"""Inject faults at named points, for tests: kill a rank, stall it or fill its disk. Imports no torch.

    TURNOUT_FAULTS="save.mid_file#2:1=kill"    kill rank 1 when it reaches save.mid_file for the second time

Faults are separated by commas. Without `#` the first time counts, without `:` every rank. Actions: `kill` (SIGKILL),
`raise` (RuntimeError), `full` (ENOSPC), `sleep` (30 s), `slow` (0.25 s, and at every later visit too). Points are
phases of the flight recorder (`phase.NAME`, with _ for spaces), collectives and places within a save.
"""

import errno
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

_FAULT = re.compile(r"([a-z_.]+)(?:#(\d+))?(?::(\d+))?=(kill|raise|full|sleep|slow)")
_SLEEP_S, _SLOW_S = 30.0, 0.25


@dataclass(slots=True)
class Fault:
    """A planned fault: its point, action and countdown."""

    point: str
    action: str
    countdown: int
    """Visits of the point until the fault happens."""


def parse_faults(text: str, rank: str) -> list[Fault]:
    """Parse TURNOUT_FAULTS and return the faults of one rank; a ValueError if one is malformed."""
    faults = []
    for part in filter(None, text.split(",")):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ValueError(f"TURNOUT_FAULTS: {part}: is not POINT[#TIME][:RANK]=ACTION")
        point, time_of, of_rank, action = match.groups()
        if of_rank in (None, rank):
            faults.append(Fault(point, action, int(time_of or 1)))
    return faults


_PLANNED: list[Fault] = []
with suppress(ValueError):  # reported by trainer/environment.py
    _PLANNED = parse_faults(os.environ.get("TURNOUT_FAULTS", ""), os.environ.get("RANK", "0"))


def hit(point: str) -> None:
    """Mark a fault point; trigger a fault that is planned for it."""
    for fault in _PLANNED:
        if fault.point == point:
            fault.countdown -= 1
            if fault.countdown == 0 or (fault.action == "slow" and fault.countdown < 0):
                _trigger(fault)


def _trigger(fault: Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError(f"planted fault at {fault.point}")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "sleep":
            time.sleep(_SLEEP_S)
        case "slow":
            time.sleep(_SLOW_S)
