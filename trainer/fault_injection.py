"""Named places where a test can make a run fail: killed, stuck, out of space. Nothing happens unless it is asked for.

    TURNOUT_FAULTS="save.mid_file#2:1=kill"    rank 1 is killed when it comes to save.mid_file for the second time

Several are separated by commas. Without `#` it is the first time, without `:` every rank. Actions: `kill` (SIGKILL),
`raise` (an error nobody expects), `full` (no space left on device), `sleep` (for 30 s). Imports no torch.
"""

import errno
import os
import re
import signal
import time
from dataclasses import dataclass

_FAULT = re.compile(r"([a-z_.]+)(?:#(\d+))?(?::(\d+))?=(kill|raise|full|sleep)")
_SLEEP_S = 30.0


@dataclass(slots=True)
class Fault:
    """Planned fault: its place, action and countdown."""

    point: str
    action: str
    countdown: int
    """Happens when this reaches 0."""


def parse_faults(text: str, rank: str) -> list[Fault]:
    """Return the faults that are asked for on a rank.

    Raises:
        ValueError: if the text does not say what, where and when.
    """
    faults = []
    for part in filter(None, text.split(",")):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ValueError(f"TURNOUT_FAULTS: {part}: is not POINT[#TIME][:RANK]=ACTION")
        point, time_of, of_rank, action = match.groups()
        if of_rank in (None, rank):
            faults.append(Fault(point, action, int(time_of or 1)))
    return faults


def _planned_at_start() -> list[Fault]:
    try:
        return parse_faults(os.environ.get("TURNOUT_FAULTS", ""), os.environ.get("RANK", "0"))
    except ValueError:  # the command line says so (trainer/environment.py)
        return []


_PLANNED = _planned_at_start()


def hit(point: str) -> None:
    """Come to a named place."""
    for fault in _PLANNED:
        if fault.point == point:
            fault.countdown -= 1
            if fault.countdown == 0:
                happen(fault)


def happen(fault: Fault) -> None:
    """Let it go wrong."""
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError(f"planted fault at {fault.point}")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "sleep":
            time.sleep(_SLEEP_S)
