"""Restart policy: whether and when a failed run is started again."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import INTERRUPTED, PREEMPTED, CheckpointError, ConfigError, DataError, NumericsError

STAYS_WRONG = {ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code, NumericsError.exit_code}
"""Exit codes of what no other attempt can mend."""
_FINAL = {0, *STAYS_WRONG, PREEMPTED, INTERRUPTED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Limits of the restart policy."""

    first_pause_s: float = 1.0
    """Before the first restart; doubles with every restart without progress."""
    longest_pause_s: float = 60.0
    max_restarts: int = 3
    """Restarts without progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOutcome:
    """Result of one attempt."""

    code: int
    """Exit code; negative: the signal that killed it."""
    checkpoint: int | None
    """Step of the newest checkpoint at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Start again."""

    pause_s: float
    number: int
    """Counts restarts without progress, from 1."""
    num_left: int
    """Number of restarts left."""


def is_retried(code: int) -> bool:
    """Tell whether another attempt may end otherwise: not where config, data, checkpoints or numbers are wrong."""
    return code not in _FINAL


def decide(history: Sequence[AttemptOutcome], *, before: int | None, policy: Policy) -> Restart | None:
    """Return what follows the last of these attempts; None: nothing.

    Progress is a newer checkpoint than there was when the attempt began.

    Args:
        history: every attempt so far, oldest first; at least one.
        before: step of the newest checkpoint when the first one began.
        policy: how patient to be.
    """
    if not is_retried(history[-1].code):
        return None
    number, newest = 0, before
    for outcome in history:
        number = 1 if _is_newer(outcome.checkpoint, newest) else number + 1
        newest = outcome.checkpoint
    if number > policy.max_restarts:
        return None
    pause_s = min(policy.first_pause_s * 2 ** (number - 1), policy.longest_pause_s)
    return Restart(pause_s=pause_s, number=number, num_left=policy.max_restarts - number)


def _is_newer(step: int | None, than: int | None) -> bool:
    return step is not None and (than is None or step > than)
