"""The MoE layer: route, limit, dispatch, compute, combine."""

import torch
from torch import Tensor, nn

from trainer.moe.capacity import limit_to_capacity
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import Router, RoutingContext
from trainer.moe.stats import MoEStats, collect_stats

# B sequences, S tokens each, T = B * S, R rows, D d_model.


class MoE(nn.Module):
    """Replaces the feed-forward network of a block by experts that each token chooses from."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        capacity: CapacityConfig,
        shared: nn.Module | None = None,
        *,
        layer: int = 0,
        needs_importance: bool = False,
        needs_expert_similarity: bool = False,
    ) -> None:
        """Put a layer together.

        Args:
            router: scores tokens.
            experts: what is here of them.
            dispatcher: moves rows to experts and back.
            capacity: how much an expert accepts.
            shared: what every token passes as well.
            layer: number of the block, which separates random orders.
            needs_importance: some loss is made of the sums of combine weights.
            needs_expert_similarity: some loss compares the outputs of a token's experts.
        """
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher, self.capacity, self.layer = dispatcher, capacity, layer
        self.needs_importance, self.needs_expert_similarity = needs_importance, needs_expert_similarity

    def forward(self, x: Tensor, context: RoutingContext) -> tuple[Tensor, MoEStats]:
        """Return the layer's output for x (B, S, D) and what it did; tokens that are not valid get 0."""
        tokens = x.flatten(0, 1)  # (T, D)
        routed = self.router(tokens, context)
        decision = limit_to_capacity(routed.decision, self.capacity, context, salt=self.layer)
        outputs = self.dispatcher.forward(tokens.to(compute_dtype(tokens)), decision, self.experts)
        out = outputs.y.view(x.shape)
        if self.shared is not None:
            out = out + self.shared(x) * context.valid.view(*x.shape[:2], 1)
        expert_similarity = outputs.expert_similarity() if self.needs_expert_similarity else None
        return out, collect_stats(
            routed, decision, context, needs_importance=self.needs_importance, expert_similarity=expert_similarity
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matrix products of x run in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
