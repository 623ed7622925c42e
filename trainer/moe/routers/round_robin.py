"""Experts in turn: what a benchmark needs in place of a flag that forces balanced routing."""

from typing import ClassVar

import torch
from torch import Tensor

from trainer.moe.routers.config.fixed import RoundRobinRouterConfig
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision


class RoundRobinRouter(Router):
    """The token at position p goes to experts p * k, ..., p * k + k - 1, modulo E, with weight 1 / k each."""

    causal: ClassVar[Causality] = "strict"

    def __init__(self, config: RoundRobinRouterConfig, *, num_experts: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.top_k, num_experts

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D) by their position alone."""
        top_k = context.top_k or self.top_k
        slot = torch.arange(top_k, device=x.device)
        expert_index = (context.position[:, None] * top_k + slot) % self.num_experts  # (T, k)
        weight = torch.full(
            expert_index.shape, 1 / top_k, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        decision = RoutingDecision.from_top_k(expert_index, weight, num_experts=self.num_experts, valid=context.valid)
        return RouterOutput(decision=decision, logits=None, probs=None)
