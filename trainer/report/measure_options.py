"""How much of a run is measured. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How much is measured."""

    max_tokens: int = 65536
    """Positions of held-out text, over all domains."""
    max_checkpoints: int = 6
    """Checkpoints that are compared, evenly spaced, the first and the last among them."""
    step: int | None = None
    """Checkpoint to measure; None: the newest."""
