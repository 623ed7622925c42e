"""The end of a run whose evaluations no longer improve (`train.early_stopping`)."""

import math
from collections.abc import Mapping
from typing import Any

from trainer.config.metric_direction import is_better
from trainer.engine.config import EarlyStoppingConfig


class EarlyStopping:
    """Counts evaluations since the best one. Alike on all ranks, which give it the same numbers."""

    def __init__(self, config: EarlyStoppingConfig | None) -> None:
        """Begin with no evaluation; None: a run never stops early."""
        self._config = config
        self._best: float | None = None
        self._best_step = self._waited = 0

    @property
    def is_over(self) -> bool:
        """Whether `patience` evaluations in a row were no better than the best one."""
        return self._config is not None and self._waited >= self._config.patience

    @property
    def reason(self) -> str:
        """Why the run is over, and how to go on all the same."""
        assert self._config is not None, "it is over"
        best = "there was none" if self._best is None else f"{self._best:.4g} after step {self._best_step}"
        return (
            f"{self._waited} evaluations in a row have no better {self._config.metric} than the best ({best}); to go "
            "on, raise train.early_stopping.patience or set train.early_stopping=null"
        )

    def note(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Take in an evaluation; one without the metric does not count, a value that is not finite is not better."""
        if self._config is None or (value := evaluation.get(self._config.metric)) is None:
            return
        config = self._config
        if math.isfinite(value) and (
            self._best is None or is_better(value, self._best, config.direction, by=config.min_delta)
        ):
            self._best, self._best_step, self._waited = value, step, 0
        else:
            self._waited += 1

    def restore(self, run: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's record of its run, which is untrusted; that of another metric does not count."""
        found, config = run.get("early_stopping"), self._config
        if config is None or not isinstance(found, Mapping):
            return
        if (found.get("metric"), found.get("mode")) != (config.metric, config.direction):
            return
        best, step, waited = found.get("best"), found.get("step"), found.get("waited")
        if type(step) is not int or type(waited) is not int or waited < 0:
            return
        if best is None or (type(best) in (int, float) and math.isfinite(best)):
            self._best, self._best_step, self._waited = best, step, waited

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint's record of the run has more; nothing if it never stops early."""
        if self._config is None:
            return {}
        counts = {"best": self._best, "step": self._best_step, "waited": self._waited}
        return {"early_stopping": {"metric": self._config.metric, "mode": self._config.direction, **counts}}
