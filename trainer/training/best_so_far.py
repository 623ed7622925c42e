"""The best evaluation of a run so far, whose checkpoint is kept (`checkpoint.best`)."""

import math
from collections.abc import Mapping
from typing import Any

from trainer.checkpoint.best import BestCheckpoint
from trainer.checkpoint.config import BestConfig
from trainer.config.metric_direction import is_better


class BestSoFar:
    """Remembers the best value of a metric and its step. Alike on all ranks, which give it the same numbers."""

    def __init__(self, config: BestConfig | None) -> None:
        """Begin with no evaluation; None: there is no metric, and nothing is ever the best."""
        self.config = config
        self._found: list[BestCheckpoint] = []

    @property
    def found(self) -> BestCheckpoint | None:
        """The best so far; None: there is none."""
        return self._found[-1] if self._found else None

    def note(self, step: int, evaluation: Mapping[str, float]) -> bool:
        """Return whether an evaluation is better than all before, so that its step must be saved. Ties are not."""
        if self.config is None or (value := evaluation.get(self.config.metric)) is None or not math.isfinite(value):
            return False
        mode = self.config.direction
        if self.found is not None and not is_better(value, self.found.value, mode):
            return False
        self._found.append(BestCheckpoint(metric=self.config.metric, mode=mode, value=value, step=step))
        return True

    def note_lost(self, step: int) -> None:
        """Forget that of `step`, which could not be saved: the next prune must not remove the best before it.

        It may be said when a later one was already found, which then may be lost too.
        """
        self._found = [best for best in self._found if best.step != step]

    def forget(self) -> None:
        """Begin anew: the next evaluation is the best."""
        self._found = []

    def restore(self, run: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's record of its run; a record of another metric does not count."""
        found, config = BestCheckpoint.of(run), self.config
        if config is not None and found is not None and (found.metric, found.mode) == (config.metric, config.direction):
            self._found = [found]

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint's record of the run has more; nothing without a best checkpoint."""
        return {} if self.found is None else {"best": self.found.record()}
