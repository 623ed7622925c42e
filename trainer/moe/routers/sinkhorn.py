"""Sinkhorn routing: top-k of a balanced transport plan, so that no balance loss is needed."""

from torch import Tensor, nn

from trainer.moe.routers.non_causal import NonCausalRouter
from trainer.moe.routers.top_k import Score, gate_logits, score_logits
from trainer.moe.routing import RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.assignment import transport_plan
from trainer.ops.select import round_logits, stable_top_k

# B sequences of S tokens, T = B * S, k experts per token, E experts, D d_model.


class SinkhornRouter(NonCausalRouter):
    """Selects experts by the transport plan of a sequence's logits, and weights them by the scores of the logits.

    The plan is balanced over experts exactly, its top k per token approximately: if all tokens of a sequence are equal,
    all entries are too and the first k experts get every token. In evaluation experts are selected by the logits.

    Source: S-BASE (Clark et al. 2022, arXiv 2202.01169), appendix B.2.1, over each sequence; combine weights are
        sigmoids of the logits, as in BASE and Megatron-Core.
    """

    def __init__(
        self, *, d_model: int, num_experts: int, top_k: int, score: Score, iterations: int, evaluates_as_trained: bool
    ) -> None:
        super().__init__(evaluates_as_trained=evaluates_as_trained)
        self.top_k, self.score, self.iterations = top_k, score, iterations
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, x)  # (T, E)
        selected_by = logits.detach()
        if self.routes_jointly(context):
            rows = context.whole_rows(logits.detach())  # (B, S, E)
            plan = transport_plan(rows, context.whole_rows(context.valid), iterations=self.iterations)
            # The plan of a row of equal tokens is uniform up to rounding error.
            selected_by = context.own_tokens(round_logits(plan, dim=-1))
        scores, _ = score_logits(logits, self.score)
        live = stable_top_k(selected_by, context.top_k or self.top_k)
        expert_index = context.chosen(live)
        decision = RoutingDecision.from_top_k(
            expert_index,
            scores.gather(-1, expert_index),
            num_experts=logits.shape[-1],
            valid=context.valid,
            num_valid=context.num_valid,
        )
        return RouterOutput(
            decision=decision, logits=logits, probs=logits.softmax(-1), scores=scores.detach(), live_choice=live
        )
