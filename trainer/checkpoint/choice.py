"""Weights that a reader chooses among those of a run: a step's, and its own or their average. Imports no torch."""

from dataclasses import dataclass
from typing import Final, Literal

WeightsOf = Literal["raw", "ema"]
"""The weights of a step, or their moving average (`train.ema`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointChoice:
    """Weights of a run to read."""

    step: int | None = None
    """Step of the checkpoint. None: the newest."""
    weights: WeightsOf = "raw"

    def said(self, step: int) -> str:
        """Return the words for these weights in the checkpoint of a step."""
        return f"step {step}" if self.weights == "raw" else f"step {step}, averaged weights"


NEWEST: Final = CheckpointChoice()
"""The weights of the newest checkpoint."""
