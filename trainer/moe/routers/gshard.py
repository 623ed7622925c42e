"""Two experts, of which a light second one is visited only sometimes."""

from dataclasses import replace

from torch import Tensor

from trainer.moe.routers.config.token_choice import GShardRouterConfig
from trainer.moe.routers.top_k import TopKRouter
from trainer.moe.routing import RoutingContext, RoutingDecision
from trainer.ops.noise import uniform


class GShardRouter(TopKRouter):
    """Keeps a token's choice after the first with probability min(1, k * weight), while training.

    The weight is the choice's share of the k, so a second expert that weighs as much as the first is always kept. What
    is not kept is not asked for: it takes no room, and no count has it.

    Source: GShard (arXiv 2006.16668), section 2.2, "random routing", which has k = 2.
    """

    def __init__(self, config: GShardRouterConfig, *, d_model: int, num_experts: int, layer: int) -> None:
        super().__init__(config, "softmax", d_model=d_model, num_experts=num_experts, layer=layer)
        self.random_second = config.random_second

    def decide(self, scores: Tensor, expert_index: Tensor, context: RoutingContext) -> RoutingDecision:
        """Weigh the selected experts (T, k), and let go of light ones by chance."""
        decision = super().decide(scores, expert_index, context)
        if context.noise_key is None or not self.random_second:
            return decision
        top_k = expert_index.shape[1]
        weight = scores.detach().gather(-1, expert_index)
        share = weight / weight.sum(-1, keepdim=True)  # (T, k)
        kept = uniform(context.noise_key, top_k, salt=f"gshard {self.layer}") < top_k * share
        kept[:, 0] = True
        return replace(decision, kept=decision.kept & kept.flatten())
