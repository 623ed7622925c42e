"""Top-k with a selection bias that balances the load without an auxiliary loss."""

from typing import Any

import torch
from torch import Tensor

from trainer.moe.routers.top_k import TopKRouter


class BiasBalancedRouter(TopKRouter):
    """Adds a per-expert bias to the scores for selection only.

    After each optimizer step the bias of underloaded experts rises and that of overloaded ones falls. All null experts
    share the last entry, whose target is the load of as many real experts; it therefore balances the mean number of
    real experts per token as well.

    Source: Wang et al. 2024 (arXiv 2408.15664), sign update; counts are taken before drops, over the whole global
        batch.
    """

    bias: Tensor

    def __init__(self, *, bias_update_rate: float, **top_k_arguments: Any) -> None:
        super().__init__(**top_k_arguments)
        self.bias_update_rate = bias_update_rate
        columns = self.num_experts + (self.null_experts > 0)
        self.register_buffer("bias", torch.zeros(columns, dtype=torch.float32))

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Return scores plus bias; combine weights are made from the unbiased scores."""
        if self.null_experts == 0:
            return scores + self.bias
        null = self.bias[-1:].expand(self.null_experts)
        return scores + torch.cat([self.bias[: self.num_experts], null])

    @torch.no_grad()
    def update(self, tokens_per_expert: Tensor) -> None:
        """Move every bias by the update rate towards a uniform load, given the counts of a step."""
        counts = tokens_per_expert.double()  # exact for any count, so that the sign is exact
        share = torch.ones_like(counts)
        share[self.num_experts :] = self.null_experts
        even = counts.sum() * share / share.sum()
        self.bias += self.bias_update_rate * torch.sign(even - counts).to(self.bias)
