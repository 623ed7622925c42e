"""Say what a run is doing, or how it ended, from its lock, its status files and the end of its log."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from trainer.checkpoint.identity import read_record
from trainer.checkpoint.run_folder import RunFolder
from trainer.errors import PREEMPTED, ConfigError
from trainer.runs.rank_statuses import RankStatuses, read_rank_statuses
from trainer.runs.recorded_config import plain_config
from trainer.runs.recorded_log import RecordedLog, finite, read_log
from trainer.status import Status

State = Literal["running", "finished", "stopped", "failed", "killed", "unknown", "not started", "damaged"]
"""`stopped`: on request, can be continued; `killed`: its process is gone without an end; `unknown`: it was last seen on
another machine, which this one cannot look into."""

_RECENT: Final = 10
"""Number of last records that a speed is the median of."""
_SEEN_S: Final = 60.0
"""A rank on another machine that wrote within this time runs, whether or not the file system shares locks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """State of a run: phase, progress and speed."""

    state: State
    phase: str | None = None
    """Phase of a running run, such as `training` or `saving`."""
    step: int = 0
    steps: int | None = None
    """Steps of the config; None if it cannot be read."""
    tokens_per_s: float | None = None
    step_s: float | None = None
    loss: float | None = None
    exit_code: int | None = None
    error: str | None = None
    ranks: int = 0
    hosts: Sequence[str] = ()
    age_s: float | None = None
    """Seconds since the newest status; None without one."""
    troubled: Sequence[str] = ()
    """Ranks of a running run that are gone, silent or behind, in words."""
    notes: Sequence[str] = ()
    """Damages of the folder, in words."""

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step at the present speed, without evaluations and saves; None if not running."""
        if self.state != "running" or self.step_s is None or self.steps is None:
            return None
        return max(0, self.steps - self.step) * self.step_s

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        names = [name for name in self.__slots__ if name not in ("hosts", "troubled", "notes")]
        lists = {name: list(getattr(self, name)) for name in ("hosts", "troubled", "notes")}
        return {**{name: getattr(self, name) for name in names}, "left_s": self.left_s, **lists}


def read_state(path: Path, log: RecordedLog | None = None) -> RunProgress:
    """Read the state of the run in a folder; `log` is its metrics.jsonl, if that has been read."""
    folder = RunFolder(path)
    log = log or read_log(folder.metrics)
    statuses, notes = read_rank_statuses(folder.status), _notes(log)
    notes += [f"status/{name} is damaged" for name in statuses.damaged]
    try:
        steps, is_damaged = _steps(plain_config(folder)), False
    except ConfigError as error:
        steps, is_damaged = None, True
        notes.insert(0, str(error))
    owner = folder.owner()
    state = _judge(folder, statuses, owner)
    ranks = [rank.status for rank in statuses.ranks]
    step_s = _recent(log, "step_s")
    first = _cause(statuses)
    is_running = state == "running"
    phase = ranks[0].phase if ranks and ranks[0].state == "running" else "start-up"
    return RunProgress(
        state="damaged" if is_damaged and not is_running else state,
        phase=phase if is_running else None,
        step=max([log.last_step, *(status.step for status in ranks)]),
        steps=steps,
        tokens_per_s=_recent(log, "tokens_per_s"),
        step_s=step_s,
        loss=log.newest("loss"),
        exit_code=None if is_running or first is None else first.exit_code,
        error=None if is_running or first is None else first.error,
        ranks=len(ranks),
        hosts=sorted({status.host for status in ranks}),
        age_s=min((rank.age_s for rank in statuses.ranks), default=None),
        troubled=statuses.troubled(step_s=step_s) if is_running else (),
        notes=notes,
    )


def _judge(folder: RunFolder, statuses: RankStatuses, owner: str | None) -> State:
    """Judge by the lock first: the kernel releases it however a process ends."""
    ranks = statuses.ranks
    if owner is not None and not (ranks and ranks[0].has_ended_in(owner)):
        return "running"
    if not ranks:
        return "not started"
    lives = {rank.life for rank in ranks}
    if "alive" in lives and not _is_copy(folder):  # a file system without locks
        return "running"
    if any(rank.life == "elsewhere" and abs(rank.age_s) < _SEEN_S for rank in ranks) and not _is_copy(folder):
        return "running"
    cause = _cause(statuses)
    if cause is not None and cause.exit_code:
        return "stopped" if cause.exit_code == PREEMPTED else "failed"
    if ranks[0].life == "ended":
        return "finished"
    return "unknown" if lives <= {"elsewhere", "ended"} else "killed"


def _cause(statuses: RankStatuses) -> Status | None:
    """Return the status of the rank whose end was first to fail, else that of a rank that ended; None if none did."""
    ended = [rank.status for rank in statuses.ranks if rank.life == "ended"]
    failed = [status for status in ended if status.exit_code]
    return min(failed, key=lambda status: status.updated, default=None) or next(iter(ended), None)


def _is_copy(folder: RunFolder) -> bool:
    """Return whether the folder says that its run is at home in another one, as a copy does until it is trained."""
    home = read_record(folder.origin).get("folder")
    return isinstance(home, str) and home != str(folder.path.absolute())


def _steps(config: dict[str, Any]) -> int | None:
    train = config.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if type(steps) is int and steps >= 0 else None


def _recent(log: RecordedLog, key: str) -> float | None:
    """Return the median of the last values of a metric."""
    found = list[float]()
    for record in reversed(log.records):
        if (value := finite(record, key)) is not None and len(found) < _RECENT:
            found.append(value)
    return statistics.median(found) if found else None


def _notes(log: RecordedLog) -> list[str]:
    """Say what is damaged in metrics.jsonl."""
    if log.unreadable is not None:
        return [f"metrics.jsonl cannot be read: {log.unreadable}"]
    if not log.damaged:
        return []
    lines = "line" if len(log.damaged) == 1 else "lines"
    numbers = ", ".join(map(str, log.damaged[:3])) + (", ..." if len(log.damaged) > 3 else "")
    return [f"metrics.jsonl: {lines} {numbers} damaged"]
