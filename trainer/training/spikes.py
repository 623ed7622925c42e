"""Detect loss spikes: losses far above those of recent steps."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

_MIN_LOSSES = 32
"""With fewer losses in the window no step is a spike."""


class SpikeWindow:
    """Recent losses of steps that were taken, and the limit above which the next loss is a spike.

    Losses of skipped steps stay out: one NaN would make every comparison false, and skipped spikes would raise the
    limit. So that a loss which stays high is not skipped forever, the window is emptied after `patience` skipped spikes
    in a row; no spike is detected until it holds 32 losses again. A spike is `sigmas` standard deviations above the
    mean of the window; None: no loss is a spike.
    """

    def __init__(self, *, sigmas: float | None, size: int, patience: int) -> None:
        self.sigmas, self.patience = sigmas, patience
        self.losses: deque[float] = deque(maxlen=size)
        """Nats per target token, oldest first."""
        self.count = 0
        """Spikes so far, skipped or not."""
        self.skipped_in_a_row = 0
        """Spikes skipped since the last step that was taken."""

    def limit(self) -> float | None:
        """Return the loss above which the next step is a spike, in nats per token; None: no limit."""
        if self.sigmas is None or len(self.losses) < _MIN_LOSSES:
            return None
        mean = math.fsum(self.losses) / len(self.losses)
        variance = math.fsum((loss - mean) ** 2 for loss in self.losses) / len(self.losses)
        # Constant losses have no scale to compare with.
        return mean + self.sigmas * math.sqrt(variance) if variance > 0 else None

    def note_taken(self, loss: float) -> None:
        """Add the loss of a step that was taken."""
        self.skipped_in_a_row = 0
        if self.sigmas is not None:
            self.losses.append(loss)

    def note_skipped(self) -> bool:
        """Count a skipped spike; return whether the window restarts because of it."""
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.patience:
            return False
        self.losses.clear()
        return True

    def record(self) -> dict[str, Any]:
        """Return the state for a checkpoint; JSON keeps every bit of a float."""
        return {"losses": list(self.losses), "count": self.count, "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Restore a `record`; an empty one, from a checkpoint without it, gives an empty window."""
        self.losses.clear()
        self.losses.extend(record.get("losses", []))
        self.count = int(record.get("count", 0))
        self.skipped_in_a_row = int(record.get("skipped_in_a_row", 0))
