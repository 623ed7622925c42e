"""Exit status of an attempt: the rank that failed first, its code and its step."""

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.distributed.rank_layout import format_ranks
from trainer.errors import PREEMPTED, CommError, ResourceError
from trainer.status import Status
from trainer.supervise.policy import STAYS_WRONG


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """The end of one attempt."""

    code: int
    """Exit code of the rank that ended it; negative: the signal that killed it."""
    exit_code: int
    """Exit code of a supervisor that does not restart."""
    what: str
    """Description of the end: "rank 1 (pid 123) was killed by SIGKILL"."""
    where: str
    """In which step: "at step 33"."""
    step: int
    """The step being taken, from 1; 0 before the first."""
    rows: Sequence[int] | None
    """First and last row of that step."""
    has_begun: bool
    """A rank had come to its first step."""
    is_unsaved: bool
    """The disk refused a save that had to be: another attempt would compute the same again, for the same disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """A rank that did not come to the end of the run."""

    rank: int
    pid: int
    code: int
    time: float = float("inf")
    """Unix time of its own word."""
    error: str | None = None


def diagnose_exit(
    returncode: int,
    *,
    pid: int,
    report: Mapping[str, Any],
    statuses: Mapping[int, Status],
    ranks: Collection[int],
    is_alone: bool,
    silent: Sequence[str] = (),
    silence_s: float = 0.0,
) -> ExitStatus:
    """Find out what ended an attempt.

    torchrun's own exit code is 1 whatever happened, and a rank that was killed leaves no word: what torchrun reports
    comes first, then what the ranks wrote themselves. When one rank fails, torchrun ends the others by SIGTERM (after
    30 s by SIGKILL) and reports them as well. A signal that came too late to stop anything changes nothing: where all
    ranks of this machine wrote that the run is done, it is.

    Args:
        returncode: of the process that was started; negative for a signal.
        pid: of that process.
        report: of torchrun; empty if it gave none.
        statuses: what this attempt's ranks wrote last.
        ranks: those of this machine.
        is_alone: the process is the only rank, not torchrun.
        silent: who gave no sign of life, and so all of them were killed: ranks by number, torchrun.
        silence_s: for how long.
    """
    reported = [_Failure(**failure) for failure in report.get("failures", [])]
    if is_alone and returncode:
        reported = [_Failure(rank=0, pid=pid, code=returncode)]
    written = [
        _Failure(rank=rank, pid=status.pid, code=status.exit_code, time=status.updated, error=status.error)
        for rank, status in statuses.items()
        if status.exit_code
    ]
    ended = {rank for rank, status in statuses.items() if status.state == "ended"}
    failures = [failure for failure in reported if failure.rank not in ended] + written
    has_begun = any(status.phase != "start-up" for status in statuses.values())
    if silent and not any(failure.code in STAYS_WRONG for failure in written):
        code = -signal.SIGKILL
        what = f"{_named(silent, pid, statuses)} gave no sign of life for {silence_s:g} s (frozen or stuck), killed"
    elif failures:
        first = min(failures, key=lambda one: (_weight(one.code), one.time, one.rank))
        code, why = first.code, f" ({first.error})" if first.error else ""
        what = f"rank {first.rank} (pid {first.pid}) {_how(code)}{why}"
    elif all(rank in statuses and statuses[rank].exit_code == 0 for rank in ranks):
        code, what = 0, "every rank ended with 0"
    else:
        code = PREEMPTED if "signal" in report and not has_begun else returncode
        why = f" ({report['error']})" if "error" in report else ""
        what = f"{'rank 0' if is_alone else 'torchrun'} (pid {pid}) {_how(returncode)}{why}"
    exit_code = code
    if silent and code < 0:
        exit_code = CommError.exit_code
    elif code < 0:  # of several ranks, the others have said what a lost one means
        said = [failure.code for failure in written if failure.code != PREEMPTED]
        exit_code = said[0] if said else 128 - code
    last = _last(statuses)
    return ExitStatus(
        code=code,
        exit_code=exit_code,
        what=what,
        where=_where(last),
        step=0 if last is None else last.step,
        rows=None if last is None else last.rows,
        has_begun=has_begun,
        is_unsaved=code == ResourceError.exit_code and last is not None and last.phase == "saving",
    )


def _named(silent: Sequence[str], pid: int, statuses: Mapping[int, Status]) -> str:
    """Return who was silent, in words; if torchrun was, that is what the ranks went under."""
    if "torchrun" in silent:
        return f"torchrun (pid {pid})"
    ranks = sorted(int(name) for name in silent if name.isdigit())
    if len(ranks) != 1:
        return format_ranks(ranks) if ranks else f"process {pid}"
    status = statuses.get(ranks[0])
    return f"rank {ranks[0]} (pid {pid if status is None else status.pid})"


def _weight(code: int) -> int:
    """Return a failure's place among several, as the others end because one did; of equals the first knows why."""
    if code in STAYS_WRONG:
        return 0  # whatever else happened would happen again
    if code == -signal.SIGTERM:
        return 4  # by torchrun, as another rank had failed
    if code == PREEMPTED:
        return 3
    return 1 if code < 0 else 2


def _last(statuses: Mapping[int, Status]) -> Status | None:
    """Return the farthest status: of a rank that wrote its end if there is one, as the others' are a second old."""
    ended = [status for status in statuses.values() if status.state == "ended"]
    return max(ended or statuses.values(), key=lambda status: status.step, default=None)


def _where(last: Status | None) -> str:
    if last is None or last.step == 0:
        return "in start-up"
    phase = "" if last.phase == "training" else f" ({last.phase})"
    return f"at {'' if last.state == 'ended' else 'about '}step {last.step}{phase}"


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"
