"""Experts at random: what is left of a mixture of experts when nobody chooses."""

from typing import ClassVar

from torch import Tensor

from trainer.moe.routers.config.fixed import RandomRouterConfig
from trainer.moe.routers.hash import at_random
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext
from trainer.ops.noise import token_keys, uniform


class RandomRouter(Router):
    """A token goes to k different experts at random, with weight 1 / k each; in evaluation by its id and position."""

    causal: ClassVar[Causality] = "strict"

    def __init__(self, config: RandomRouterConfig, *, num_experts: int, layer: int) -> None:
        super().__init__()
        self.config, self.num_experts, self.layer = config, num_experts, layer

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D), whatever they are."""
        key = context.noise_key
        if key is None:
            key = token_keys(0, context.token_ids, context.position)
        drawn = uniform(key, self.num_experts, salt=f"random {self.layer}")  # (T, E)
        return at_random(drawn, x, context, context.top_k or self.config.top_k)
