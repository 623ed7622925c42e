"""Engine interface: owns gradients and performs optimizer steps.

# L MoE layers, E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from trainer.checkpoint.state import TrainState
from trainer.data.batches.batch import Batch
from trainer.models.gpt import GPT


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSums:
    """Routing statistics of all MoE layers, summed over many rows."""

    counts: Tensor
    """(L, E) int64 assignments before drops."""
    dropped: Tensor
    """(L,) int64 assignments over capacity."""
    tokens: Tensor
    """(L,) int64 valid tokens."""
    entropy_sum: Tensor | None
    """(L,) entropy of the router probabilities, in nats; None if the router has none."""

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        """Add up two disjoint sets of rows."""
        return RoutingSums(
            counts=self.counts + other.counts,
            dropped=self.dropped + other.dropped,
            tokens=self.tokens + other.tokens,
            entropy_sum=None
            if self.entropy_sum is None or other.entropy_sum is None
            else self.entropy_sum + other.entropy_sum,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step, over all of its micro-batches."""

    loss: float
    """Cross-entropy in nats per target token."""
    balance_loss: float | None
    """Per routed token and MoE layer, without coefficient: 1 when balanced."""
    z_loss: float | None
    grad_norm: float
    """2-norm of the whole gradient before clipping."""
    skipped: bool
    """Data and step went on, the weights did not: something was not finite, or the loss was over the limit."""
    not_finite: str | None
    """Description of what was not finite in loss and gradient; such a step is skipped."""
    num_tokens: int
    """Valid tokens in the global batch."""
    routing: RoutingSums | None
    """None for a dense model."""
    extra_losses: dict[str, float] = field(default_factory=dict)
    """The losses that are on besides these, by name, in the same units: without coefficient, but for `router`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSums:
    """Sums over evaluation batches."""

    loss_sum: float
    """Cross-entropy in nats."""
    target_tokens: int
    routing: RoutingSums | None
    """Routing statistics of the target tokens."""

    def __add__(self, other: "EvalSums") -> "EvalSums":
        """Add up two disjoint sets of rows."""
        routing = None if self.routing is None or other.routing is None else self.routing + other.routing
        return EvalSums(
            loss_sum=self.loss_sum + other.loss_sum,
            target_tokens=self.target_tokens + other.target_tokens,
            routing=routing,
        )


class Engine(ABC):
    """Performs optimizer steps. Owns gradients: accumulation, reduction, clipping, update."""

    model: GPT

    @abstractmethod
    def train_step(self, micro_batches: Sequence[Batch], *, lr: float, skip_above: float | None = None) -> StepResult:
        """Take one optimizer step over the global batch that the micro-batches make up.

        The step is skipped, on all ranks, if its loss or gradient is not finite or its loss is above `skip_above`.
        """

    @abstractmethod
    def eval_loss(self, batch: Batch, *, dropless: bool, top_k: int | None = None) -> EvalSums:
        """Evaluate a batch without gradients and without noise.

        Args:
            batch: of this rank.
            dropless: ignore the capacity.
            top_k: experts per token instead of the configured number.
        """

    @abstractmethod
    def state(self) -> TrainState:
        """Return everything that the next step depends on, by name. Every rank must call it."""

    @abstractmethod
    def load_state(self, state: TrainState) -> None:
        """Take over a state of the parts that `wanted` names, each rank by itself: reading may fail on one of them."""

    def wanted(self) -> TrainState:
        """Return which parts of which tensors `load_state` takes; only their places matter."""
        return self.state()

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context in which the model computes in the precision of training."""
        return nullcontext()

    def close(self) -> None:  # noqa: B027 - most engines hold nothing to close
        """Release what the engine holds."""
