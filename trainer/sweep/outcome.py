"""The outcome of a sweep: mean and standard error of each candidate, and the one to choose. Imports no torch."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.runs.significance import error_of_mean
from trainer.sweep.candidates import Candidate
from trainer.sweep.trial_result import TrialResult


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateOutcome:
    """Results of a candidate over seeds and folds."""

    candidate: Candidate
    steps: int
    """Steps that it was trained for."""
    is_final: bool
    """Whether these are all of them: successive halving ends the others earlier."""
    results: Mapping[tuple[int | None, int], TrialResult]
    """By fold and seed."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Reason of each failed trial, by its name."""
    num_trials: int = 1

    @property
    def name(self) -> str:
        """Name of the candidate."""
        return self.candidate.name

    @property
    def values(self) -> list[float]:
        """The metric of each trial that has one."""
        return [result.value for result in self.results.values()]

    @property
    def is_comparable(self) -> bool:
        """Whether every trial has trained to the last step."""
        return self.is_final and len(self.results) == self.num_trials

    @property
    def mean(self) -> float | None:
        """Mean over the trials that have trained."""
        return statistics.fmean(self.values) if self.results else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single trial."""
        return error_of_mean(self.values)

    @property
    def training_flops(self) -> float | None:
        """Mean FLOPs of a training."""
        found = [one.training_flops for one in self.results.values() if one.training_flops is not None]
        return statistics.fmean(found) if found else None

    @property
    def train_s(self) -> float | None:
        """Mean seconds of a training."""
        return statistics.fmean(one.train_s for one in self.results.values()) if self.results else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The candidate to choose, and why."""

    name: str
    reason: str


def behind(one: CandidateOutcome, best: CandidateOutcome) -> tuple[float, float | None] | None:
    """Return the mean difference to the best candidate over the seeds and folds of both, and its standard error.

    Seeds and folds are the same for all, so what they share is not in this error.
    """
    shared = [key for key in one.results if key in best.results]
    differences = [one.results[key].value - best.results[key].value for key in shared]
    return (statistics.fmean(differences), error_of_mean(differences)) if differences else None


def best_of(outcomes: Sequence[CandidateOutcome], *, maximize: bool = False) -> CandidateOutcome | None:
    """Return the candidate with the best mean among those that trained to the end; None if there is none."""
    comparable = [one for one in outcomes if one.is_comparable]
    return min(comparable, key=lambda one: _loss(one, maximize), default=None)


def recommend(outcomes: Sequence[CandidateOutcome], *, maximize: bool = False) -> Recommendation | None:
    """Choose by the one-standard-error rule; None if no candidate has all its trials.

    The cheapest candidate, by the FLOPs of a training, whose mean is within one standard error of the best (Breiman,
    Friedman, Olshen and Stone, Classification and Regression Trees, 1984); of equally cheap ones the best.
    """
    best = best_of(outcomes, maximize=maximize)
    if best is None:
        return None
    if sum(one.is_comparable for one in outcomes) == 1:
        return Recommendation(name=best.name, reason="the only one that has trained to the end")
    if best.error is None:
        reason = "the best; one training of each says nothing about chance: give seeds or folds"
        return Recommendation(name=best.name, reason=reason)
    if best.training_flops is None:
        return Recommendation(name=best.name, reason="the best mean; the runs do not say how many FLOPs they took")
    limit = _loss(best, maximize) + best.error
    within = [
        (one.training_flops, _loss(one, maximize), one)
        for one in outcomes
        if one.is_comparable and one.training_flops is not None and _loss(one, maximize) <= limit
    ]
    flops, _, chosen = min(within, key=lambda entry: entry[:2])
    if chosen is best:
        reason = f"the best mean, {best.mean:.4f}; no cheaper one is within its standard error of {best.error:.4f}"
        return Recommendation(name=best.name, reason=reason)
    share = f"{flops / best.training_flops:.2f} of its FLOPs"
    return Recommendation(
        name=chosen.name,
        reason=f"its mean of {chosen.mean:.4f} is within one standard error ({best.error:.4f}) of the best, "
        f"{best.name} with {best.mean:.4f}, at {share}",
    )


def _loss(one: CandidateOutcome, maximize: bool) -> float:
    assert one.mean is not None, "only of candidates that have trained"
    return -one.mean if maximize else one.mean
