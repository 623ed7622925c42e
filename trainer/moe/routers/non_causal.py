"""Base classes of routers that route all tokens of a sequence jointly, and so are not causal.

# B sequences of S tokens, T = B * S, n valid tokens of one sequence, E experts, D d_model.
"""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.moe.routers.top_k import gate_logits
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.select import round_mantissa, stable_top_k


class NonCausalRouter(Router):
    """Router whose choice for a token depends on later tokens in training, and optionally in evaluation."""

    causal: ClassVar[Causality] = "within_sequence"
    sees_whole_rows: ClassVar[bool] = True

    def __init__(self, *, evaluates_as_trained: bool) -> None:
        super().__init__()
        self.evaluates_as_trained = evaluates_as_trained

    @property
    def causal_in_evaluation(self) -> Causality:
        """Causality in evaluation: `strict` unless it routes as in training."""
        return self.causal if self.evaluates_as_trained else "strict"

    def routes_jointly(self, context: RoutingContext) -> bool:
        """Return whether this pass routes tokens jointly; never for part of a sequence (cached generation)."""
        return context.is_training or (self.evaluates_as_trained and not context.is_incremental)


class AssignmentRouter(NonCausalRouter):
    """Assigns each sequence's tokens to experts under a capacity; combine weights are the softmax probabilities.

    An expert accepts C = ceil(capacity_factor * k * n / E) of the n valid tokens of a sequence. In evaluation each
    token takes its top k experts, unless `evaluates_as_trained`.
    """

    def __init__(
        self, *, d_model: int, num_experts: int, top_k: int, capacity_factor: float, evaluates_as_trained: bool
    ) -> None:
        super().__init__(evaluates_as_trained=evaluates_as_trained)
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    @abstractmethod
    def assign_rows(self, scores: Tensor, valid: Tensor, *, top_k: int) -> Tensor:
        """Return (B, S, E) bool: the chosen pairs of every sequence, given scores (B, S, E) and valid (B, S)."""

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, x)  # (T, E)
        probs = logits.softmax(-1)
        scores, top_k = probs.detach(), context.top_k or self.top_k
        if self.routes_jointly(context):
            rows = context.whole_rows(scores.where(context.valid[:, None], 0))  # (B, S, E)
            valid = context.whole_rows(context.valid)
            chosen = context.own_tokens(self.assign_rows(round_mantissa(rows, dim=1), valid, top_k=top_k))
        else:
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, stable_top_k(scores, top_k), True)
        decision = RoutingDecision.from_mask(chosen, probs, valid=context.valid)
        return RouterOutput(decision=decision, logits=logits, probs=probs)


class SolvingRouter(AssignmentRouter):
    """Assigns one sequence after the other, on the host, where the scores of all come together: a single wait."""

    @abstractmethod
    def assign(self, scores: Tensor, *, top_k: int, capacity: int) -> Tensor:
        """Return (n, E) bool: the chosen pairs of one sequence's valid tokens and experts, given scores (n, E)."""

    def assign_rows(self, scores: Tensor, valid: Tensor, *, top_k: int) -> Tensor:
        """Return (B, S, E) bool: the chosen pairs of every sequence, given scores (B, S, E) and valid (B, S)."""
        here, is_valid = rows_on_host(scores, valid)
        chosen = torch.zeros_like(here, dtype=torch.bool)
        for row, mask in enumerate(is_valid):
            capacity = sequence_capacity(int(mask.sum()), here.shape[-1], top_k=top_k, factor=self.capacity_factor)
            chosen[row, mask] = self.assign(here[row, mask], top_k=top_k, capacity=capacity)
        return chosen.to(scores.device, non_blocking=True)


def rows_on_host(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores (B, S, E) and valid (B, S) on the host, where they come in one copy."""
    both = torch.cat([scores.double(), valid[..., None]], dim=-1).cpu()
    return both[..., :-1].to(scores.dtype), both[..., -1] > 0


def sequence_capacity(num_tokens: int, num_experts: int, *, top_k: int, factor: float) -> int:
    """Return C = ceil(factor * k * n / E), at most n."""
    # As in `expert_capacity`: 1.1 * 10 must be 11, not 12.
    return min(num_tokens, math.ceil(factor * top_k * num_tokens / num_experts - 1e-9))


def sequence_capacities(valid: Tensor, num_experts: int, *, top_k: int, factor: float) -> Tensor:
    """Return (B,) int64: `sequence_capacity` of each sequence, given valid (B, S), without waiting for the device."""
    num_tokens = valid.sum(1)
    capacity = (factor * top_k * num_tokens.double() / num_experts - 1e-9).ceil().long()
    return torch.minimum(num_tokens, capacity)
