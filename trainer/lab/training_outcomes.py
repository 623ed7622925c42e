"""Results of trainings, read from their run folders. Imports no torch."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.lab.router_kinds import looks_ahead
from trainer.lab.router_trainings import Training
from trainer.trackers.jsonl import read_jsonl

_LATE = 0.9
"""Routing is judged by the steps after this share of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """Result of one training; of several seeds, their means, and the median of times."""

    router: str
    held_out_losses: Sequence[float]
    """One for each seed: nats per token at the end, routed as the config says for evaluation."""
    load_imbalance: float | None
    """Mean over the last tenth of the steps, as for the two below; None where the run has no such number."""
    drop_rate: float | None
    experts_per_token: float | None
    """Experts that tokens asked for."""
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
        """Hidden units that are computed for a token: what its experts cost, whatever their number."""
        return None if self.experts_per_token is None else self.experts_per_token * self.expert_width


def outcome(training: Training) -> TrainingOutcome | None:
    """Return what a finished training came to; None if it is not finished.

    Raises:
        DataError: if its metrics.jsonl is damaged.
    """
    steps, moe = training.config.train.steps, training.config.model.moe
    assert moe is not None, "whoever planned it has looked"
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


def over_seeds(outcomes: Sequence[TrainingOutcome]) -> TrainingOutcome:
    """Return one outcome for a router's trainings."""
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
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
