"""GShard's routing: the second expert is kept at random, in proportion to its weight."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from trainer.moe.routers.top_k import TopKRouter
from trainer.moe.routing import RoutingContext, RoutingDecision
from trainer.ops.noise import uniform


class GShardRouter(TopKRouter):
    """Keeps each choice after the first with probability min(1, k * weight) in training.

    The weight is the choice's share of the sum over the k, so a second expert with the weight of the first is always
    kept. A choice that is not kept takes no capacity and is not counted.

    Source: GShard (arXiv 2006.16668), section 2.2, "random routing", which has k = 2.
    """

    def __init__(self, *, random_second: bool, **top_k_arguments: Any) -> None:
        super().__init__(**top_k_arguments)
        self.random_second = random_second

    def decide(self, scores: Tensor, expert_index: Tensor, context: RoutingContext) -> RoutingDecision:
        """Weight the selected experts (T, k), and drop light ones at random in training."""
        decision = super().decide(scores, expert_index, context)
        if context.noise_key is None or not self.random_second:
            return decision
        top_k = expert_index.shape[1]
        weight = scores.detach().gather(-1, expert_index)
        share = weight / weight.sum(-1, keepdim=True)  # (T, k)
        kept = uniform(context.noise_key, top_k, salt=f"gshard {self.layer}") < top_k * share
        kept[:, 0] = True
        return replace(decision, kept=decision.kept & kept.flatten(), num_rows=None)
