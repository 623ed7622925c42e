"""Warnings of a best candidate at an end of a grid, beyond which a better one may lie. Imports no torch."""

from collections.abc import Iterator, Sequence
from typing import Any

from trainer.config.dump import inline, short
from trainer.config.loader import load
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.sweep.candidates import Candidate
from trainer.sweep.outcome import CandidateOutcome, best_of, recommend
from trainer.sweep.plan_trials import Sweep

_MOST = 10.0
"""Largest factor between the end of a grid and the value to try next."""


def end_warnings(sweep: Sweep, outcomes: Sequence[CandidateOutcome]) -> list[str]:
    """Return a warning for each numeric key whose best or recommended value is the last of its grid.

    Not where the experiment allows none beyond it, as more experts for a token than there are.
    """
    maximize = sweep.config.maximize
    best, chosen = best_of(outcomes, maximize=maximize), recommend(outcomes, maximize=maximize)
    if best is None or chosen is None:
        return []
    compared = [one.candidate for one in outcomes if one.results]
    found = list(_open_ends(sweep, best.candidate, "best", compared))
    if chosen.name != best.name:
        [recommended] = [one for one in compared if one.name == chosen.name]
        found += _open_ends(sweep, recommended, "recommended", compared)
    return found


def _open_ends(sweep: Sweep, candidate: Candidate, what: str, compared: Sequence[Candidate]) -> Iterator[str]:
    for key, value in candidate.changes.items():
        values = sweep.config.over.get(key)
        numbers = sorted({one for one in values if _is_number(one)}) if isinstance(values, list) else []
        if not _is_number(value) or len(numbers) < 2 or value not in (numbers[0], numbers[-1]):
            continue
        if all(one.changes.get(key, value) == value for one in compared):
            continue  # the others have failed
        end, further = ("highest", numbers[-2]) if value == numbers[-1] else ("lowest", numbers[1])
        beyond = _beyond(further, value)
        if _is_allowed(sweep, candidate, key, beyond):
            yield (
                f"{key}: the {what} candidate, {candidate.name}, has the {end} value of the grid, {short(value)}: a "
                f"better one may lie beyond it; add values such as {short(beyond)}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _beyond(inner: float, end: float) -> float:
    """Return the value after the end of a grid: as far from it as its neighbour, by a factor if both are positive."""
    factor = min(max(end / inner, 1 / _MOST), _MOST) if min(inner, end) > 0 else 0.0
    beyond = end * factor if factor else end + (end - inner)
    if isinstance(inner, int) and isinstance(end, int):
        whole = round(beyond)
        return whole if whole != end else end + (1 if end > inner else -1)
    return float(f"{beyond:.4g}")


def _is_allowed(sweep: Sweep, candidate: Candidate, key: str, value: float) -> bool:
    """Return whether a trained trial of the candidate could have another value."""
    try:
        load(sweep.trials_of(candidate)[0].folder.config, [f"{key}={inline(value)}"], ExperimentConfig)
    except ConfigError:
        return False
    return True
