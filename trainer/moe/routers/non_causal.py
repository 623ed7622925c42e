"""Base class of routers that decide all tokens of a sequence together.

# B sequences of S tokens, T = B * S, n valid tokens of one sequence, E experts, D d_model.
"""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.moe.routers.config.options import AssignmentOptions, LookAheadOptions
from trainer.moe.routers.top_k import gate_logits
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.select import round_mantissa, stable_top_k


class LookAheadRouter(Router):
    """Non-causal router: a token's experts depend on later tokens while training; in evaluation as configured."""

    causal: ClassVar[Causality] = "within_sequence"

    def __init__(self, config: LookAheadOptions) -> None:
        super().__init__()
        self.looks_ahead_in_evaluation = config.evaluation == "same"

    @property
    def causal_in_evaluation(self) -> Causality:
        """Strict, if every token then chooses for itself."""
        return self.causal if self.looks_ahead_in_evaluation else "strict"

    def looks_ahead(self, context: RoutingContext) -> bool:
        """Tell whether this pass routes as in training; of a piece of a row nothing can be decided together."""
        return context.is_training or (self.looks_ahead_in_evaluation and not context.is_incremental)


class AssignmentRouter(LookAheadRouter):
    """Gives each sequence's tokens to experts that have room for so many; weights are the softmax probabilities.

    An expert has room for C = ceil(room * k * n / E) of the n valid tokens of a sequence. In evaluation a token takes
    the experts that it finds best, unless the config says `same`.
    """

    def __init__(self, config: AssignmentOptions, *, d_model: int, num_experts: int) -> None:
        super().__init__(config)
        self.top_k, self.room = config.top_k, config.room
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    @abstractmethod
    def assign(self, scores: Tensor, *, top_k: int, room: int) -> Tensor:
        """Return which pairs (n, E) of a sequence's valid tokens and experts are chosen, given their scores (n, E)."""

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, x)  # (T, E)
        probs = logits.softmax(-1)
        scores, top_k = probs.detach(), context.top_k or self.top_k
        if self.looks_ahead(context):
            chosen = self._assign_rows(scores, context, top_k)
        else:
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, stable_top_k(scores, top_k), True)
        decision = RoutingDecision.from_mask(chosen, probs, valid=context.valid)
        return RouterOutput(decision=decision, logits=logits, probs=probs)

    def _assign_rows(self, scores: Tensor, context: RoutingContext, top_k: int) -> Tensor:
        """Return (T, E) bool, one sequence at a time."""
        rows = scores.where(context.valid[:, None], 0).view(*context.valid_rows.shape, -1)  # (B, S, E)
        rows = round_mantissa(rows, dim=1)
        chosen = torch.zeros_like(rows, dtype=torch.bool)
        for row, valid in enumerate(context.valid_rows):
            room = places(int(valid.sum()), rows.shape[-1], top_k=top_k, room=self.room)
            chosen[row, valid] = self.assign(rows[row, valid], top_k=top_k, room=room)
        return chosen.view(scores.shape)


def places(num_tokens: int, num_experts: int, *, top_k: int, room: float) -> int:
    """Return C = ceil(room * k * n / E), n at most."""
    return min(num_tokens, math.ceil(room * top_k * num_tokens / num_experts - 1e-9))
