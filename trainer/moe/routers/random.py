"""Random routing: the baseline that any learned router must beat."""

from typing import ClassVar

from torch import Tensor

from trainer.moe.routers.hash import route_by_values
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext
from trainer.ops.noise import token_keys, uniform


class RandomRouter(Router):
    """Sends a token to k distinct random experts, weight 1 / k each; in evaluation, a function of id and position."""

    causal: ClassVar[Causality] = "strict"

    def __init__(self, *, num_experts: int, layer: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.layer, self.top_k = num_experts, layer, top_k

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D) independently of their values."""
        key = context.noise_key
        if key is None:
            key = token_keys(0, context.token_ids, context.position)
        values = uniform(key, self.num_experts, salt=f"random {self.layer}")  # (T, E)
        return route_by_values(values, x, context, context.top_k or self.top_k)
