"""Passes of a step's micro-batches through the layers: through all at once, or by the stages of a pipeline.

# B rows of a micro-batch, S tokens in a row, D d_model.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.models.gpt import GPT, GPTOutput
from trainer.moe.routing import RoutingOptions

Take = Callable[[GPTOutput, Batch, range], None]
"""Takes what some layers gave of a batch."""
Share = Callable[[GPTOutput, Batch, range], Tensor]
"""Returns the share of the objective of some layers and a micro-batch."""


class ModelOwner(Protocol):
    """Owner of the model."""

    model: GPT

    def before_forward(self) -> None:
        """Prepare the next forward pass."""
        ...

    def autocast(self, *, keeps_casts: bool = True) -> AbstractContextManager[object]:
        """Return a context in which the model computes in the precision of training."""
        ...


@dataclass(frozen=True, slots=True)
class RunLayers:
    """Runs layers of an engine's model."""

    engine: ModelOwner
    options: RoutingOptions

    def __call__(self, batch: Batch, hidden: Tensor | None, layers: range) -> GPTOutput:
        """Return what some layers give; `hidden` (B, S, D) comes from those before, None for the first."""
        self.engine.before_forward()
        with self.engine.autocast():
            return self.engine.model(batch, self.options, hidden=hidden, layers=layers)

    def overlapped(self, batches: Sequence[Batch], hidden: Sequence[Tensor | None], layers: range) -> list[GPTOutput]:
        """Return what some layers give of two batches, one of which is computed while tokens of the other travel."""
        self.engine.before_forward()
        # A cast that both used would sum their gradients in bfloat16.
        with self.engine.autocast(keeps_casts=False):
            return self.engine.model.overlapped(batches, self.options, hidden=hidden, layers=layers)


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


class OverlappedModel(WholeModel):
    """All layers are here: two micro-batches at a time, one computed while tokens of the other travel, and back.

    Autograd runs the nodes of both in the reverse order of the forward pass, so that gradients travel likewise. The
    last one of an odd number is alone.
    """

    def train(self, batches: Sequence[Batch], run: RunLayers, share: Share, gradients: Gradients) -> None:
        """Run all micro-batches forward and backward."""
        pairs = [batches[i : i + 2] for i in range(0, len(batches) - 1, 2)]
        for pair in pairs:
            self._recorder.enter("forward")
            outputs = zip(run.overlapped(pair, [None, None], self._layers), pair, strict=True)
            parts = [share(output, batch, self._layers) for output, batch in outputs]
            self._recorder.enter("backward")
            gradients.begin_backward(is_last=pair[-1] is batches[-1])
            gradients.backward(torch.stack(parts).sum())
        if len(batches) % 2:
            super().train(batches[-1:], run, share, gradients)
