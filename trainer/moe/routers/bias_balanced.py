"""Top-k with a selection bias that evens out the load, so that `balance.coef` can be 0 and disturbs no gradient."""

import torch
from torch import Tensor

from trainer.moe.routers.config.token_choice import BiasBalancedRouterConfig, GroupLimitedRouterConfig
from trainer.moe.routers.top_k import TopKRouter


class BiasBalancedRouter(TopKRouter):
    """Adds a bias to the scores for selection only.

    After each step the bias rises for underused experts and falls for busy ones. Null experts share the last one, which
    falls while they are chosen more often than as many real experts at an even load: how many experts tokens have is
    balanced by it as well.

    Source: Wang et al. 2024 (arXiv 2408.15664), sign update;
    counts are those before drops, over the whole optimizer step.
    """

    bias: Tensor

    def __init__(
        self,
        config: BiasBalancedRouterConfig | GroupLimitedRouterConfig,
        *,
        d_model: int,
        num_experts: int,
        layer: int,
    ) -> None:
        super().__init__(config, config.score, d_model=d_model, num_experts=num_experts, layer=layer)
        self.bias_update_rate = config.bias_update_rate
        columns = num_experts + (config.null_experts > 0)
        self.register_buffer("bias", torch.zeros(columns, dtype=torch.float32))

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Return scores plus bias; the combine weights never see the bias."""
        if self.config.null_experts == 0:
            return scores + self.bias
        null = self.bias[-1:].expand(self.config.null_experts)
        return scores + torch.cat([self.bias[: self.num_experts], null])

    @torch.no_grad()
    def update(self, tokens_per_expert: Tensor) -> None:
        """Move every expert's bias by the update rate towards an even load, given the counts of a step."""
        counts = tokens_per_expert.double()  # exact for any count, so that the sign is exact
        share = torch.ones_like(counts)
        share[self.num_experts :] = self.config.null_experts
        even = counts.sum() * share / share.sum()
        self.bias += self.bias_update_rate * torch.sign(even - counts).to(self.bias)
