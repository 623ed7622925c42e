"""Keys of metrics in a config, and whether less or more of each is better. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import Field

from trainer.config.base import Config, Problem

MetricKey = Annotated[str, Field(pattern=r"^eval/[A-Za-z0-9._@+/ -]{1,120}$")]
Direction = Literal["min", "max"]

_LESS: Final = ("loss", "bits_per_byte", "loss_capacity")
_MORE: Final = ("acc", "acc_norm", "macro_f1", "hit@", "mrr", "ndcg@", "bleu", "chrf", "rouge", "exact_match")
"""Names, and beginnings of names that end in a number."""


def direction_of(metric: str) -> Direction | None:
    """Return whether the least or the greatest value of a metric is the best, by its last name; None: not known."""
    name = metric.rpartition("/")[2]
    if name in _LESS:
        return "min"
    return "max" if name in _MORE or name.startswith(("hit@", "ndcg@", "rouge")) else None


def direction_problem(metric: str, mode: Direction | None) -> str | None:
    """Return why nobody knows which value of a metric is the best; None if it is known."""
    if mode is not None or direction_of(metric) is not None:
        return None
    return f"whether less or more of {metric} is better is not known; give mode: min or max"


class ComparedMetric(Config):
    """Number of the evaluations that is compared with earlier ones."""

    metric: MetricKey
    """Its key in metrics.jsonl: eval/loss, eval/ema/loss, eval/DOMAIN/loss, eval/TASK/acc."""
    mode: Direction | None = None
    """Whether the least or the greatest value is the best. Null: by its name; losses the least, accuracies the
    greatest."""

    @property
    def direction(self) -> Direction:
        """The mode, or the one that goes with the metric's name."""
        return self.mode or direction_of(self.metric) or "min"

    def problems(self) -> Iterator[Problem]:
        """Require a mode where the name does not tell it."""
        if (wrong := direction_problem(self.metric, self.mode)) is not None:
            yield Problem("mode", wrong)


def is_better(value: float, best: float, mode: Direction, *, by: float = 0.0) -> bool:
    """Return whether a value is better than the best one by more than a margin; no comparison with NaN holds."""
    return value < best - by if mode == "min" else value > best + by
