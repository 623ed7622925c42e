"""The seam of the experts' kernels: rows, weights and gradients of a layer, and what computes them.

# N tokens, R rows, E experts, D d_model, F d_ff, H width before the activation (2 F with a gate).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.ops.low_rank import NO_ADAPTERS, ExpertAdapters, LowRankGradients
from trainer.ops.weighted_activation import WeightedActivation


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRows:
    """Rows of an experts' computation, in expert order."""

    x: Tensor
    """(N, D) tokens."""
    token_of_row: Tensor
    """(R,)."""
    scale: Tensor
    """(R,) combine weights, 0 for empty rows."""
    rows_per_expert: Tensor
    """(E,)."""

    @property
    def expert_of_row(self) -> Tensor:
        """(R,) int64; some expert for rows after the last group."""
        place = torch.arange(len(self.scale), device=self.scale.device)
        found = torch.searchsorted(self.rows_per_expert.cumsum(0), place, right=True)
        return found.clamp_(max=len(self.rows_per_expert) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Weights of all experts. They may be wider than the rows, whose dtype is that of the products."""

    w_in: Tensor
    """(E, H, D)."""
    w_out: Tensor
    """(E, D, F)."""
    bias: Tensor | None = None
    """(E, H), added to the hidden values."""
    adapters: ExpertAdapters = NO_ADAPTERS
    learns_in: bool = True
    """Whether w_in has a gradient: that of frozen weights is not computed."""
    learns_out: bool = True
    learns_bias: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGradients:
    """Gradients of an experts' computation; of weights in their dtype, zeros for experts without rows."""

    x: Tensor
    """(R, D)."""
    scale: Tensor
    """(R,)."""
    w_in: Tensor | None
    """(E, H, D); None: it does not learn."""
    w_out: Tensor | None
    """(E, D, F)."""
    bias: Tensor | None
    """(E, H)."""
    adapter_in: LowRankGradients | None = None
    adapter_out: LowRankGradients | None = None

    def of_weights(self) -> list[Tensor]:
        """Return those of everything that learns here."""
        factors = [*(self.adapter_in or ()), *(self.adapter_out or ())]
        return [gradient for gradient in (self.w_in, self.w_out, self.bias, *factors) if gradient is not None]


class FFNKernel(ABC):
    """Computes the rows of all experts, forward and backward; all kernels are equal up to rounding."""

    def __init__(self, activation: WeightedActivation) -> None:
        self.activation = activation

    @abstractmethod
    def forward(self, rows: ExpertRows, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs (R, D) and the hidden values (R or more, H)."""

    @abstractmethod
    def hidden(self, rows: ExpertRows, weights: LayerWeights) -> Tensor:
        """Return the hidden values again."""

    @abstractmethod
    def backward(self, grad: Tensor, rows: ExpertRows, h: Tensor, weights: LayerWeights) -> RowGradients:
        """Return the gradients, given that of the tokens' sums (N, D) and the hidden values."""
