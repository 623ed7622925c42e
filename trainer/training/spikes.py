"""Loss spikes: losses far above those of the steps before."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

_LEAST = 32
"""Losses that tell what is usual: fewer judge nothing."""


class SpikeWindow:
    """The last losses of steps that were taken, and what counts as a spike after them.

    Only finite losses of steps that were taken enter: one NaN would make every comparison false, and spikes that were
    skipped would make themselves usual. So that a loss which stays high is not skipped for ever, the window empties
    after `patience` skipped spikes without a step between them that was taken; the next 32 losses are then not judged.

    Args:
        sigmas: standard deviations above the mean; None: nothing is a spike.
        size: how many losses to keep.
        patience: skipped spikes in a row after which what is usual is learned anew.
    """

    def __init__(self, *, sigmas: float | None, size: int, patience: int) -> None:
        self.sigmas, self.patience = sigmas, patience
        self.losses: deque[float] = deque(maxlen=size)
        """Nats per target token, oldest first."""
        self.count = 0
        """Spikes so far, skipped or not."""
        self.skipped_in_a_row = 0
        """Spikes that were skipped since the last step that was taken."""

    def limit(self) -> float | None:
        """Return the loss above which the next step is a spike, in nats per token; None: it is not judged."""
        if self.sigmas is None or len(self.losses) < _LEAST:
            return None
        mean = math.fsum(self.losses) / len(self.losses)
        variance = math.fsum((loss - mean) ** 2 for loss in self.losses) / len(self.losses)
        # Losses that are all the same say nothing of how far one may be from them.
        return mean + self.sigmas * math.sqrt(variance) if variance > 0 else None

    def taken(self, loss: float) -> None:
        """Note the loss of a step that was taken."""
        self.skipped_in_a_row = 0
        if self.sigmas is not None:
            self.losses.append(loss)

    def skipped(self) -> bool:
        """Note a spike that was skipped; return whether it was one too many, so that the window starts anew."""
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.patience:
            return False
        self.losses.clear()
        return True

    def record(self) -> dict[str, Any]:
        """Return everything that later decisions hang on, for a checkpoint; JSON keeps each float to its last bit."""
        return {"losses": list(self.losses), "count": self.count, "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take over a `record`; an empty one, as of a checkpoint that has none, is a new window."""
        self.losses.clear()
        self.losses.extend(record.get("losses", []))
        self.count = int(record.get("count", 0))
        self.skipped_in_a_row = int(record.get("skipped_in_a_row", 0))
