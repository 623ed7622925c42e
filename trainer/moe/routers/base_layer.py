"""BASE layers: a balanced assignment of one expert per token."""

import torch
from torch import Tensor, nn

from trainer.moe.routers.non_causal import NonCausalRouter, rows_on_host
from trainer.moe.routers.top_k import gate_logits
from trainer.moe.routing import RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.assignment import balanced_assignment
from trainer.ops.select import round_logits, stable_top_k

# B sequences, T tokens, n valid tokens of one sequence, E experts, D d_model.


class BASELayerRouter(NonCausalRouter):
    """Assigns a sequence's tokens at the maximum sum of logits, at most ceil(n / E) to each expert.

    The combine weight is the sigmoid of the chosen logit, which has a gradient; no balance loss is needed. In
    evaluation each token takes its best expert.

    Source: BASE layers (Lewis et al. 2021, arXiv 2103.16716), solved exactly instead of by an auction, and per sequence
        instead of over all ranks, so that it does not depend on the layout.
    """

    def __init__(self, *, d_model: int, num_experts: int, evaluates_as_trained: bool) -> None:
        super().__init__(evaluates_as_trained=evaluates_as_trained)
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, x)  # (T, E)
        expert = stable_top_k(logits.detach(), 1)  # (T, 1)
        if self.routes_jointly(context):
            compared = logits.detach().where(context.valid[:, None], -torch.inf)
            rows = round_logits(context.whole_rows(compared), dim=1)  # (B, S, E)
            rows, is_valid = rows_on_host(rows, context.whole_rows(context.valid))
            assigned = torch.zeros_like(is_valid, dtype=torch.int64)
            for row, valid in enumerate(is_valid):
                assigned[row, valid] = balanced_assignment(rows[row, valid])
            expert = context.own_tokens(assigned.to(x.device, non_blocking=True))[:, None]
        expert, live = context.chosen(expert), expert
        scores = logits.sigmoid()  # logits can be negative, which scores must not be
        decision = RoutingDecision.from_top_k(
            expert,
            scores.gather(-1, expert),
            num_experts=logits.shape[-1],
            valid=context.valid,
            num_valid=context.num_valid,
        )
        return RouterOutput(
            decision=decision, logits=logits, probs=logits.softmax(-1), scores=scores.detach(), live_choice=live
        )
