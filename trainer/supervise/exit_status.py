"""Exit status of an attempt: which rank failed first, with which code and in which step."""

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.distributed.rank_layout import format_ranks
from trainer.errors import PREEMPTED, CommError, ResourceError
from trainer.status import Status
from trainer.supervise.policy import STAYS_WRONG


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """End of one attempt."""

    code: int
    """Exit code of the rank that ended it; negative: the signal that killed it."""
    exit_code: int
    """Exit code of the supervisor if it does not restart."""
    what: str
    """Cause of the end, such as "rank 1 (pid 123) was killed by SIGKILL"."""
    where: str
    step: int
    """Current step, from 1; 0 before the first."""
    rows: Sequence[int] | None
    has_begun: bool
    is_unsaved: bool
    """The final save failed for lack of resources: another attempt would repeat the work and fail again."""


class _Failure(NamedTuple):
    """A rank that ended before the run did."""

    rank: int
    pid: int
    code: int
    time: float = float("inf")
    """Unix time of its last status; inf if it wrote none."""
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
    """Determine what ended an attempt.

    torchrun's own exit code is 1 for every failure, and a killed rank writes no status, so both torchrun's report and
    the ranks' status files are used. When one rank fails, torchrun ends the others by SIGTERM (by SIGKILL after 30 s)
    and reports them too. A stop signal that came too late is ignored: if all ranks of this node have finished, the run
    has.

    Args:
        returncode: of the child process; negative for a signal.
        pid: of the child process.
        report: of torchrun; empty if there is none.
        statuses: last status of each rank of this attempt.
        ranks: ranks of this node.
        is_alone: the child is the only rank, not torchrun.
        silent: processes without liveness messages, for which the attempt was killed: ranks by number, or torchrun.
        silence_s: for how long they were silent.
    """
    reported = [_Failure(**failure) for failure in report.get("failures", [])]
    if is_alone and returncode:
        reported = [_Failure(rank=0, pid=pid, code=returncode)]
    written = [
        _Failure(rank, one.pid, one.exit_code, one.updated, one.error)
        for rank, one in statuses.items()
        if one.exit_code
    ]
    ended = {rank for rank, status in statuses.items() if status.state == "ended"}
    failures = [failure for failure in reported if failure.rank not in ended] + written
    has_begun = any(status.phase != "start-up" for status in statuses.values())
    if silent and not any(failure.code in STAYS_WRONG for failure in written):
        code = -signal.SIGKILL
        what = f"{_named(silent, pid, statuses)} sent no liveness message for {silence_s:g} s (frozen or stuck), killed"
    elif failures:
        first = min(failures, key=lambda one: (_priority(one.code), one.time, one.rank))
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
    elif code < 0:  # prefer the exit code by which other ranks reported the lost one
        exit_code = next((failure.code for failure in written if failure.code != PREEMPTED), 128 - code)
    # Prefer ranks that have ended, as other statuses are up to 1 s old.
    done = [statuses[rank] for rank in ended]
    last = max(done or statuses.values(), key=lambda status: status.step, default=None)
    where = "in start-up"
    if last is not None and last.step > 0:
        phase = "" if last.phase == "training" else f" ({last.phase})"
        where = f"at {'' if last.state == 'ended' else 'about '}step {last.step}{phase}"
    step, rows = (0, None) if last is None else (last.step, last.rows)
    is_unsaved = code == ResourceError.exit_code and last is not None and last.phase == "saving"
    return ExitStatus(code, exit_code, what, where, step, rows, has_begun, is_unsaved)


def _named(silent: Sequence[str], pid: int, statuses: Mapping[int, Status]) -> str:
    """Return the silent processes in words; if torchrun is one of them, only torchrun."""
    if "torchrun" in silent:
        return f"torchrun (pid {pid})"
    ranks = sorted(int(name) for name in silent if name.isdigit())
    if len(ranks) != 1:
        return format_ranks(ranks) if ranks else f"process {pid}"
    status = statuses.get(ranks[0])
    return f"rank {ranks[0]} (pid {pid if status is None else status.pid})"


def _priority(code: int) -> int:
    """Return how likely a failure is the cause of the others, lowest first; ties are broken by time."""
    if code in STAYS_WRONG:
        return 0  # would recur, whatever else happened
    if code == -signal.SIGTERM:
        return 4  # sent by torchrun after another rank failed
    if code == PREEMPTED:
        return 3
    return 1 if code < 0 else 2


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"
