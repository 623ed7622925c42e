"""Mixture of depths: some tokens pass through the feed-forward network, the others skip it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.moe.routers.non_causal import NonCausalRouter, sequence_capacities
from trainer.moe.routers.top_k import gate_logits
from trainer.moe.routing import RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.select import best_of_rows, round_logits

# B sequences of S tokens, T = B * S, n valid tokens of one sequence, D d_model.


class MixtureOfDepthsRouter(NonCausalRouter):
    """Computes the ceil(capacity * n) tokens of a sequence with the highest logits, weighted by their sigmoid.

    The router's own loss is the cross-entropy between the sign of the logit and the selection, so that in evaluation
    the sign alone can decide, causally. It trains the gate only: `x` gets no gradient from it.

    Source: Raposo et al. 2024 (arXiv 2404.02258), for the feed-forward sub-layer. They weight by the unbounded logit;
        of their two ways to sample, this combines the loss of the first with the stopped gradient of the second.
    """

    def __init__(self, *, d_model: int, capacity: float, predictor_coef: float, evaluates_as_trained: bool) -> None:
        super().__init__(evaluates_as_trained=evaluates_as_trained)
        self.capacity, self.predictor_coef = capacity, predictor_coef
        self.gate = nn.Linear(d_model, 1, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, x)  # (T, 1)
        chosen = self._select(logits.detach(), context) if self.routes_jointly(context) else logits.detach() > 0
        loss = None
        if self.predictor_coef:
            predicted = gate_logits(self.gate, x.detach())  # (T, 1)
            loss = self.predictor_coef * F.binary_cross_entropy_with_logits(
                predicted, chosen.to(predicted.dtype), reduction="none"
            ).squeeze(-1)
        decision = RoutingDecision.from_mask(chosen, logits.sigmoid(), valid=context.valid)
        return RouterOutput(decision=decision, logits=logits, probs=None, loss=loss)

    def _select(self, logits: Tensor, context: RoutingContext) -> Tensor:
        """Return (T, 1) bool: the highest logits (T, 1) of each sequence."""
        compared = logits.squeeze(-1).where(context.valid, -torch.inf)
        rows, valid = round_logits(context.whole_rows(compared), dim=1), context.whole_rows(context.valid)  # (B, S)
        num_computed = sequence_capacities(valid, 1, top_k=1, factor=self.capacity)
        return context.own_tokens(best_of_rows(rows, valid, num_computed))[:, None]
