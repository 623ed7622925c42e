"""Mixture of depths: some tokens are computed, the others keep the residual stream as it is."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.moe.routers.config.sequence_choice import MixtureOfDepthsRouterConfig
from trainer.moe.routers.non_causal import LookAheadRouter, places
from trainer.moe.routers.top_k import gate_logits
from trainer.moe.routing import RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.select import round_logits, stable_top_k

# B sequences of S tokens, T = B * S, n valid tokens of one sequence, D d_model.


class MixtureOfDepthsRouter(LookAheadRouter):
    """Computes the ceil(share * n) tokens of a sequence that score highest, weighted by the sigmoid of their logit.

    The loss of the router is the cross-entropy of the sign of the logit against having been chosen, so that in
    evaluation the sign can decide, which looks at no later token. It moves the logit alone: `x` gets no gradient of it.

    Source: Raposo et al. 2024 (arXiv 2404.02258), for the feed-forward sub-layer. Its weight is the logit itself, which
    is not bounded; of its two ways to sample we take the loss of the first and the stopped gradient of the second.
    """

    def __init__(self, config: MixtureOfDepthsRouterConfig, *, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.gate = nn.Linear(d_model, 1, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, x)  # (T, 1)
        if not self.looks_ahead(context):
            chosen = logits.detach() > 0
        else:
            compared = logits.detach().squeeze(-1).where(context.valid, -torch.inf)
            rows = round_logits(compared.view(context.valid_rows.shape), dim=1)  # (B, S)
            chosen = torch.zeros_like(rows, dtype=torch.bool)
            for row, valid in enumerate(context.valid_rows):
                num_computed = places(int(valid.sum()), 1, top_k=1, room=self.config.share)
                here = torch.zeros_like(rows[row, valid], dtype=torch.bool)
                here[stable_top_k(rows[row, valid][None], num_computed)[0]] = True
                chosen[row, valid] = here
            chosen = chosen.view(-1, 1)
        loss = None
        if self.config.predictor_coef:
            own = gate_logits(self.gate, x.detach())  # (T, 1)
            loss = self.config.predictor_coef * F.binary_cross_entropy_with_logits(
                own, chosen.to(own.dtype), reduction="none"
            ).squeeze(-1)
        decision = RoutingDecision.from_mask(chosen, logits.sigmoid(), valid=context.valid)
        return RouterOutput(decision=decision, logits=logits, probs=None, loss=loss)
