"""The MoE layer: route, limit, dispatch, compute, combine."""

import torch
from torch import Tensor, nn

from trainer.moe.capacity import limit_to_capacity
from trainer.moe.config import CapacityConfig
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.experts import Experts
from trainer.moe.routing import Router, RoutingContext
from trainer.moe.stats import MoEStats, account

# B sequences, S tokens each, T = B * S, R rows, D d_model.


class MoELayer(nn.Module):
    """Replaces the feed-forward network of a block by experts that each token chooses from."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        capacity: CapacityConfig,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher, self.capacity = dispatcher, capacity

    def forward(self, x: Tensor, context: RoutingContext) -> tuple[Tensor, MoEStats]:
        """Return the layer's output for x (B, S, D) and what it did; tokens that are not valid get 0."""
        tokens = x.flatten(0, 1)  # (T, D)
        routed = self.router(tokens, context)
        decision = limit_to_capacity(routed.decision, self.capacity, context)
        out = self.dispatcher.run(tokens.to(compute_dtype(tokens)), decision, self.experts).view(x.shape)
        if self.shared is not None:
            out = out + self.shared(x) * context.valid.view(*x.shape[:2], 1)
        return out, account(routed, decision, context)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matrix products of x run in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
