"""Round-robin routing: perfectly balanced by construction, for benchmarks."""

import torch
from torch import Tensor

from trainer.moe.routers.hash import equal_weights
from trainer.moe.routing import Router, RouterOutput, RoutingContext


class RoundRobinRouter(Router):
    """Sends the token at position p to experts p * k, ..., p * k + k - 1, modulo E, with weight 1 / k each."""

    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, num_experts

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D) by their position alone."""
        top_k = context.top_k or self.top_k
        slot = torch.arange(top_k, device=x.device)
        expert_index = (context.position[:, None] * top_k + slot) % self.num_experts  # (T, k)
        return equal_weights(expert_index, x, context, num_experts=self.num_experts)
