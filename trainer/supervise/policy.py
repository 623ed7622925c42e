"""Restart policy: whether and when a failed run is started again."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import INTERRUPTED, PREEMPTED, CheckpointError, ConfigError, DataError, NumericsError

STAYS_WRONG = {ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code, NumericsError.exit_code}
"""Exit codes of failures that would recur in every attempt."""
_FINAL = {0, *STAYS_WRONG, PREEMPTED, INTERRUPTED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Limits of the restart policy."""

    first_pause_s: float = 1.0
    """Pause before the first restart; doubles with each restart without progress."""
    longest_pause_s: float = 60.0
    max_restarts: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOutcome:
    """Result of one attempt."""

    code: int
    checkpoint: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Decision to start the run again."""

    pause_s: float
    number: int
    """Index of this restart without progress, from 1."""
    num_left: int


def is_retried(code: int) -> bool:
    """Return whether another attempt may succeed; not if config, data, checkpoints or numerics are wrong."""
    return code not in _FINAL


def decide(history: Sequence[AttemptOutcome], *, before: int | None, policy: Policy) -> Restart | None:
    """Decide whether to restart after the last attempt of a history, oldest first; None: do not.

    An attempt makes progress if it leaves a newer checkpoint than it found, the first one than `before`.
    """
    if not is_retried(history[-1].code):
        return None
    number, newest = 0, before
    for outcome in history:
        has_progressed = outcome.checkpoint is not None and (newest is None or outcome.checkpoint > newest)
        number, newest = 1 if has_progressed else number + 1, outcome.checkpoint
    if number > policy.max_restarts:
        return None
    pause_s = min(policy.first_pause_s * 2 ** (number - 1), policy.longest_pause_s)
    return Restart(pause_s=pause_s, number=number, num_left=policy.max_restarts - number)
