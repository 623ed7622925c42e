"""Read the results of trainings from their run folders. Imports no torch."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.lab.router_configs import looks_ahead
from trainer.lab.router_trainings import Training
from trainer.runs.recorded_log import RecordedLog
from trainer.runs.run_figures import late_mean
from trainer.trackers.jsonl import read_jsonl

_ROUTING = ("load_imbalance", "drop_rate", "experts_per_token")


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
    expert_width: int  # d_ff of one expert
    step_s: float  # median over the steps
    looks_ahead: str  # `no`, `in training`, or `always`

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
    log = RecordedLog(records=records)
    return TrainingOutcome(
        router=training.router,
        held_out_losses=[evaluated[-1]["eval/loss"]],
        expert_width=moe.d_ff,
        step_s=statistics.median(record["step_s"] for record in logged),
        looks_ahead=looks_ahead(moe.router),
        **{key: late_mean(log, key) for key in _ROUTING},
    )


def mean_over_seeds(outcomes: Sequence[TrainingOutcome]) -> TrainingOutcome:
    """Combine a router's trainings into one outcome."""
    return replace(
        outcomes[0],
        held_out_losses=[loss for one in outcomes for loss in one.held_out_losses],
        step_s=statistics.median(one.step_s for one in outcomes),
        **_means([asdict(one) for one in outcomes]),
    )


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each routing metric; None if no record has it."""
    present = {key: [record[key] for record in records if record.get(key) is not None] for key in _ROUTING}
    return {key: statistics.fmean(values) if values else None for key, values in present.items()}
