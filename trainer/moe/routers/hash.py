"""Hash routing: experts are a fixed function of the token id; nothing is learned."""

import torch
from torch import Tensor

from trainer.moe.routing import Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.noise import uniform
from trainer.ops.select import stable_top_k


class HashRouter(Router):
    """Sends a token to k distinct experts determined by its id, the layer and the salt, with weight 1 / k each.

    Source: Hash layers (Roller et al. 2021, arXiv 2106.04426), the random hash; their balanced hash needs token
        frequencies in advance.
    """

    def __init__(self, *, num_experts: int, layer: int, top_k: int, salt: int) -> None:
        super().__init__()
        self.num_experts, self.layer, self.top_k, self.salt = num_experts, layer, top_k, salt

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D) by their ids alone."""
        values = uniform(context.token_ids, self.num_experts, salt=f"hash {self.salt} {self.layer}")  # (T, E)
        expert_index = stable_top_k(values, context.top_k or self.top_k)
        return equal_weights(expert_index, x, context, num_experts=self.num_experts)


def equal_weights(expert_index: Tensor, x: Tensor, context: RoutingContext, *, num_experts: int) -> RouterOutput:
    """Return the output of a router that gives tokens x (T, D) the experts (T, k), with weight 1 / k each."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = torch.full(expert_index.shape, 1 / expert_index.shape[1], device=x.device, dtype=dtype)
    decision = RoutingDecision.from_top_k(
        expert_index, weight, num_experts=num_experts, valid=context.valid, num_valid=context.num_valid
    )
    return RouterOutput(decision=decision, logits=None, probs=None)
