"""Read the results of trainings from their run folders. Imports no torch."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.lab.router_configs import looks_ahead
from trainer.lab.router_trainings import Training
from trainer.trackers.jsonl import read_jsonl

_LATE = 0.9
"""Routing metrics are averaged over the steps after this fraction of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """Result of one training, or of several seeds: means, and the median of times."""

    router: str
    held_out_losses: Sequence[float]
    """Final loss of each seed, in nats per token, with the config's evaluation routing."""
    load_imbalance: float | None
    """Mean over the last tenth of the steps, like the next two; None if the run does not log it."""
    drop_rate: float | None
    experts_per_token: float | None
    """Experts a token asked for, before drops."""
    expert_width: int
    """d_ff of one expert."""
    step_s: float
    """Median over the steps."""
    looks_ahead: str
    """`no`, `in training`, or `always`."""

    @property
    def held_out_loss(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.held_out_losses)

    @property
    def width_per_token(self) -> float | None:
        """Hidden units computed per token: the cost of its experts, whatever their number."""
        return None if self.experts_per_token is None else self.experts_per_token * self.expert_width


def read_outcome(training: Training) -> TrainingOutcome | None:
    """Read the outcome of a training; None if it is not finished.

    Raises:
        DataError: if its metrics.jsonl is damaged.
    """
    steps, moe = training.config.train.steps, training.config.model.moe
    assert moe is not None, "plan_trainings checked it"
    path = training.folder.metrics
    records = read_jsonl(path) if path.is_file() else []
    logged = [record for record in records if record.get("step_s") is not None]
    evaluated = [record for record in records if record["step"] == steps and record.get("eval/loss") is not None]
    if not logged or not evaluated:
        return None
    late = [record for record in logged if record["step"] > _LATE * steps]
    return TrainingOutcome(
        router=training.router,
        held_out_losses=[evaluated[-1]["eval/loss"]],
        load_imbalance=_mean_of(late, "load_imbalance"),
        drop_rate=_mean_of(late, "drop_rate"),
        experts_per_token=_mean_of(late, "experts_per_token"),
        expert_width=moe.d_ff,
        step_s=statistics.median(record["step_s"] for record in logged),
        looks_ahead=looks_ahead(moe.router),
    )


def mean_over_seeds(outcomes: Sequence[TrainingOutcome]) -> TrainingOutcome:
    """Combine a router's trainings into one outcome."""
    first = outcomes[0]

    def mean(value_of: Callable[[TrainingOutcome], float | None]) -> float | None:
        return _mean([value_of(one) for one in outcomes])

    return TrainingOutcome(
        router=first.router,
        held_out_losses=[loss for one in outcomes for loss in one.held_out_losses],
        load_imbalance=mean(lambda one: one.load_imbalance),
        drop_rate=mean(lambda one: one.drop_rate),
        experts_per_token=mean(lambda one: one.experts_per_token),
        expert_width=first.expert_width,
        step_s=statistics.median(one.step_s for one in outcomes),
        looks_ahead=first.looks_ahead,
    )


def _mean_of(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return _mean([record.get(key) for record in records])


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None
