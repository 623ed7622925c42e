"""One expert for every token, equally many tokens for every expert."""

import torch
from torch import Tensor, nn

from trainer.moe.routers.config.sequence_choice import BaseRouterConfig
from trainer.moe.routers.non_causal import LookAheadRouter
from trainer.moe.routers.top_k import gate_logits
from trainer.moe.routing import RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.assignment import balanced
from trainer.ops.select import round_logits, stable_top_k

# B sequences, T tokens, n valid tokens of one sequence, E experts, D d_model.


class BASELayerRouter(LookAheadRouter):
    """Balanced assignment of a sequence's tokens at the greatest sum of logits, ceil(n / E) for an expert at most.

    The weight is the sigmoid of the chosen logit, so there is a gradient and no balance loss is needed. In evaluation
    a token takes its best expert.

    Source: BASE layers (Lewis et al. 2021, arXiv 2103.16716), solved exactly and not by an auction, and
    for each sequence instead of over all ranks, so that the layout does not matter.
    """

    def __init__(self, config: BaseRouterConfig, *, d_model: int, num_experts: int) -> None:
        super().__init__(config)
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, x)  # (T, E)
        expert = stable_top_k(logits.detach(), 1)  # (T, 1)
        if self.looks_ahead(context):
            compared = logits.detach().where(context.valid[:, None], -torch.inf)
            rows = round_logits(compared.view(*context.valid_rows.shape, -1), dim=1)  # (B, S, E)
            assigned = torch.zeros_like(context.valid_rows, dtype=torch.int64)
            for row, valid in enumerate(context.valid_rows):
                assigned[row, valid] = balanced(rows[row, valid])
            expert = assigned.view(-1, 1)
        scores = logits.sigmoid()  # logits can be negative, and no choice can be measured by them
        decision = RoutingDecision.from_top_k(
            expert, scores.gather(-1, expert), num_experts=logits.shape[-1], valid=context.valid
        )
        return RouterOutput(decision=decision, logits=logits, probs=logits.softmax(-1), scores=scores.detach())
