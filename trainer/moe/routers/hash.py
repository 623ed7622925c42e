"""Experts by the token's id: nothing learned, nothing to balance but the words themselves."""

from typing import ClassVar

import torch
from torch import Tensor

from trainer.moe.routers.config.fixed import HashRouterConfig
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.noise import uniform
from trainer.ops.select import stable_top_k


class HashRouter(Router):
    """A token goes to k different experts that are a function of its id, the layer and the salt; weight 1 / k each.

    Source: Hash layers (Roller et al. 2021, arXiv 2106.04426), its random hash; one that evens out the load needs the
    frequency of every token beforehand.
    """

    causal: ClassVar[Causality] = "strict"

    def __init__(self, config: HashRouterConfig, *, num_experts: int, layer: int) -> None:
        super().__init__()
        self.config, self.num_experts, self.layer = config, num_experts, layer

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D) by their ids alone."""
        drawn = uniform(context.token_ids, self.num_experts, salt=f"hash {self.config.salt} {self.layer}")  # (T, E)
        return at_random(drawn, x, context, context.top_k or self.config.top_k)


def at_random(drawn: Tensor, x: Tensor, context: RoutingContext, top_k: int) -> RouterOutput:
    """Route every token to the k experts with the largest of its numbers (T, E), with equal weights."""
    expert_index = stable_top_k(drawn, top_k)  # (T, k)
    weight = torch.full(
        expert_index.shape, 1 / top_k, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    decision = RoutingDecision.from_top_k(expert_index, weight, num_experts=drawn.shape[-1], valid=context.valid)
    return RouterOutput(decision=decision, logits=None, probs=None)
