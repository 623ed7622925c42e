"""Passes of a step's micro-batches through the layers: through all at once, or by the stages of a pipeline.

# B rows of a micro-batch, S tokens in a row, D d_model.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.models.gpt import GPTOutput

Take = Callable[[GPTOutput, Batch, range], None]
"""Takes what some layers gave of a batch."""
Share = Callable[[GPTOutput, Batch, range], Tensor]
"""Returns the share of the objective of some layers and a micro-batch."""


class RunLayers(Protocol):
    """Runs some layers of the model on a batch."""

    def __call__(self, batch: Batch, hidden: Tensor | None, layers: range) -> GPTOutput:
        """Return what the layers give; `hidden` (B, S, D) comes from those before, None for the first."""
        ...


class Gradients(Protocol):
    """Owner of the gradients."""

    def begin_backward(self, *, is_last: bool) -> None:
        """Prepare the next backward pass, the last one of a step or not."""
        ...

    def backward(self, objective: Tensor) -> None:
        """Accumulate a gradient."""
        ...


class Passes(Protocol):
    """Order of the passes of a step."""

    has_last: bool
    """True if the last layer is here."""

    def train(self, batches: Sequence[Batch], run: RunLayers, share: Share, gradients: Gradients) -> None:
        """Run all micro-batches forward and backward."""
        ...

    def evaluate(self, batches: Sequence[Batch], run: RunLayers, take: Take) -> None:
        """Run all batches forward only, without gradients."""
        ...


class WholeModel:
    """All layers are here: one micro-batch after another, forward and backward."""

    has_last = True

    def __init__(self, num_layers: int, recorder: FlightRecorder) -> None:
        self._layers, self._recorder = range(num_layers), recorder

    def train(self, batches: Sequence[Batch], run: RunLayers, share: Share, gradients: Gradients) -> None:
        """Run all micro-batches forward and backward."""
        for batch in batches:
            self._recorder.enter("forward")
            part = share(run(batch, None, self._layers), batch, self._layers)
            self._recorder.enter("backward")
            gradients.begin_backward(is_last=batch is batches[-1])
            gradients.backward(part)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], run: RunLayers, take: Take) -> None:
        """Run all batches forward only."""
        for batch in batches:
            take(run(batch, None, self._layers), batch, self._layers)
