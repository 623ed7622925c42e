"""Engine interface: owns the gradients and performs optimizer steps.

# L MoE layers, E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.checkpoint.state import TrainState
from trainer.data.batches.batch import Batch
from trainer.models.gpt import GPT
from trainer.moe.stats import MoEStats
from trainer.ops.tensor_sums import TensorSums


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSums(TensorSums):
    """Routing statistics of all MoE layers, summed over rows."""

    counts: Tensor
    """(L, E) int64 assignments before drops."""
    dropped: Tensor
    """(L,) int64 assignments over capacity."""
    tokens: Tensor
    """(L,) int64 valid tokens."""
    entropy_sum: Tensor | None
    """(L,) entropy of the router probabilities, in nats; None if the router has none."""

    @classmethod
    def of(cls, moe: Sequence[MoEStats]) -> "RoutingSums | None":
        """Sum over the rows of a micro-batch; None for a dense model."""
        if not moe:
            return None
        entropies = [stats.entropy_sum.sum() for stats in moe if stats.entropy_sum is not None]
        return cls(
            counts=torch.stack([stats.counts.sum(0) for stats in moe]),
            dropped=torch.stack([stats.dropped.sum() for stats in moe]),
            tokens=torch.stack([stats.tokens.sum() for stats in moe]),
            entropy_sum=torch.stack(entropies) if entropies else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Result of one optimizer step, over all ranks and micro-batches."""

    loss: float
    """Cross-entropy in nats per target token."""
    balance_loss: float | None
    """Per routed token and MoE layer, without coefficient: 1 if balanced."""
    z_loss: float | None
    grad_norm: float
    """2-norm of the whole gradient before clipping."""
    skipped: bool
    """True if the update was skipped, because of a value that is not finite or a loss above the limit."""
    not_finite: str | None
    """Description of the non-finite loss or gradient that caused the skip."""
    num_tokens: int
    """Valid tokens in the global batch."""
    routing: RoutingSums | None
    """None for a dense model."""
    extra_losses: dict[str, float] = field(default_factory=dict)
    """The other losses that are on, by name, in the same units: without coefficient, except `router`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSums:
    """Sums over evaluation batches."""

    loss_sum: float
    """Cross-entropy in nats."""
    target_tokens: int
    routing: RoutingSums | None
    """Routing statistics of the target tokens."""

    def __add__(self, other: "EvalSums") -> "EvalSums":
        """Add the sums of two disjoint sets of rows."""
        routing = None if self.routing is None or other.routing is None else self.routing + other.routing
        return EvalSums(
            loss_sum=self.loss_sum + other.loss_sum,
            target_tokens=self.target_tokens + other.target_tokens,
            routing=routing,
        )


class Engine(ABC):
    """Performs optimizer steps. Owns the gradients: accumulation, reduction, clipping, update."""

    model: GPT

    @abstractmethod
    def train_step(self, micro_batches: Sequence[Batch], *, lr: float, skip_above: float | None = None) -> StepResult:
        """Take one optimizer step over the global batch that the micro-batches form.

        All ranks skip the update if loss or gradient is not finite, or if the loss exceeds `skip_above`.
        """

    @abstractmethod
    def eval_loss(self, batch: Batch, *, dropless: bool, top_k: int | None = None) -> EvalSums:
        """Evaluate a batch without gradients and noise.

        Args:
            batch: of this rank.
            dropless: ignore the capacity.
            top_k: experts per token, overriding the config.
        """

    @abstractmethod
    def state(self) -> TrainState:
        """Return everything the next step depends on, by name. Collective: every rank must call it."""

    @abstractmethod
    def load_state(self, state: TrainState) -> None:
        """Load the slices that `wanted` names. Not collective, so that a read may fail on one rank alone."""

    def wanted(self) -> TrainState:
        """Return the slices of tensors that `load_state` expects; only their positions and shapes matter."""
        return self.state()

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context in which the model computes in the precision of training."""
        return nullcontext()

    def close(self) -> None:  # noqa: B027 - most engines hold nothing to close
        """Release the engine's resources."""
