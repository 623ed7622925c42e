"""Top-k of a balanced transport plan: balance by rescaling instead of by a loss."""

from torch import Tensor, nn

from trainer.moe.routers.config.sequence_choice import SinkhornRouterConfig
from trainer.moe.routers.non_causal import LookAheadRouter
from trainer.moe.routers.top_k import gate_logits, scores_of
from trainer.moe.routing import RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.assignment import transport_plan
from trainer.ops.select import round_logits, stable_top_k

# B sequences of S tokens, T = B * S, k experts per token, E experts, D d_model.


class SinkhornRouter(LookAheadRouter):
    """Selects by the transport plan of a sequence's logits, and weighs by the scores of the logits themselves.

    The plan is even over experts; the k largest entries of a token are nearly so. Where all tokens of a sequence are
    equal every entry is the same, and the first k experts get them. In evaluation the logits select.

    Source: S-BASE (Clark et al. 2022, arXiv 2202.01169), appendix B.2.1, over each sequence; the combine weight is the
    sigmoid of the logit, as in BASE and Megatron-Core.
    """

    def __init__(self, config: SinkhornRouterConfig, *, d_model: int, num_experts: int) -> None:
        super().__init__(config)
        self.config = config
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, x)  # (T, E)
        selected_by = logits.detach()
        if self.looks_ahead(context):
            rows = logits.view(*context.valid_rows.shape, -1)  # (B, S, E)
            plan = transport_plan(rows, context.valid_rows, iterations=self.config.iterations)
            # A row of equal tokens has an even plan, but for rounding.
            selected_by = round_logits(plan, dim=-1).view(logits.shape)
        scores, _ = scores_of(logits, self.config.score)
        expert_index = stable_top_k(selected_by, context.top_k or self.config.top_k)
        decision = RoutingDecision.from_top_k(
            expert_index, scores.gather(-1, expert_index), num_experts=logits.shape[-1], valid=context.valid
        )
        return RouterOutput(decision=decision, logits=logits, probs=logits.softmax(-1), scores=scores.detach())
