"""The `checkpoint` section: when to save, and which checkpoints to keep. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.config.base import Config, Problem
from trainer.config.metric_direction import ComparedMetric, MetricKey, direction_problem
from trainer.config.numbers import MAX_INT, Count, Seconds


class BestConfig(ComparedMetric):
    """Number of the evaluations by which checkpoints are compared."""


class CheckpointConfig(Config):
    """When to save, and which checkpoints to keep."""

    every: Count | None = 500
    """Steps between checkpoints; the last step is always saved. Null: only the last step."""
    keep: Annotated[int, Field(ge=2, le=MAX_INT)] = 3
    """Number of newest intact checkpoints to keep: at least two, in case one is damaged."""
    keep_every: Count | None = None
    """Keep checkpoints of steps that are a multiple of this forever. Null: none."""
    best: MetricKey | BestConfig | None = None
    """Also save after each evaluation that is the best so far, and keep that checkpoint: a metric such as eval/loss, or
    {metric, mode}. `--step best` reads it. Null: none."""
    retry_s: Seconds = 600.0
    """How long to retry the final save after a disk error, in seconds."""
    asynchronous: bool = True
    """Write in the background, from a copy of the state in memory. False: training waits, and no copy is made."""

    @property
    def best_metric(self) -> BestConfig | None:
        """The metric that `best` compares; None: none."""
        return BestConfig(metric=self.best) if isinstance(self.best, str) else self.best

    def problems(self) -> Iterator[Problem]:
        """Require a known direction of a metric that is named alone."""
        if isinstance(self.best, str) and direction_problem(self.best, None) is not None:
            remedy = f"give {{metric: {self.best}, mode: min}} or max"
            yield Problem("best", f"whether less or more of {self.best} is better is not known; {remedy}")
