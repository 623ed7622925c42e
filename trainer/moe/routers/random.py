"""Random routing: the baseline that any learned router must beat."""

from torch import Tensor

from trainer.moe.routers.hash import equal_weights
from trainer.moe.routing import Router, RouterOutput, RoutingContext
from trainer.ops.noise import token_keys, uniform
from trainer.ops.select import stable_top_k


class RandomRouter(Router):
    """Sends a token to k distinct random experts, weight 1 / k each; in evaluation, a function of id and position."""

    def __init__(self, *, num_experts: int, layer: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.layer, self.top_k = num_experts, layer, top_k

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D) independently of their values."""
        key = token_keys(0, context.token_ids, context.position) if context.noise_key is None else context.noise_key
        values = uniform(key, self.num_experts, salt=f"random {self.layer}")  # (T, E)
        expert_index = stable_top_k(values, context.top_k or self.top_k)
        return equal_weights(expert_index, x, context, num_experts=self.num_experts)
