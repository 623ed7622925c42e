"""The best checkpoint of a run by a metric: its entry in the record of later ones. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

from trainer.config.metric_direction import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class BestCheckpoint:
    """The checkpoint with the best value of a metric so far."""

    metric: str
    mode: Direction
    value: float
    step: int

    def record(self) -> dict[str, Any]:
        """Return JSON values: `run.best` of a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> Self | None:
        """Return the entry in a checkpoint's record of its run, which is untrusted; None: no entry, or malformed."""
        found = run.get("best")
        if not isinstance(found, Mapping) or set(found) != {"metric", "mode", "value", "step"}:
            return None
        metric, mode, value, step = (found[key] for key in ("metric", "mode", "value", "step"))
        if not isinstance(metric, str) or mode not in ("min", "max") or type(step) is not int or step < 0:
            return None
        if type(value) not in (int, float) or not math.isfinite(value):
            return None
        return cls(metric=metric, mode=cast("Direction", mode), value=float(value), step=step)
