"""Top-k with a selection bias that evens out the load, so that `balance.coef` can be 0 and disturbs no gradient."""

import torch
from torch import Tensor

from trainer.moe.routers.config.token_choice import BiasBalancedRouterConfig, GroupLimitedRouterConfig
from trainer.moe.routers.top_k import TopKRouter


class BiasBalancedRouter(TopKRouter):
    """Adds a bias to the scores for selection only.

    After each step the bias rises for underused experts and falls for busy ones; null experts have none.

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
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Return scores plus bias; the combine weights never see the bias."""
        if self.config.null_experts == 0:
            return scores + self.bias
        return scores + torch.nn.functional.pad(self.bias, (0, self.config.null_experts))

    @torch.no_grad()
    def update(self, tokens_per_expert: Tensor) -> None:
        """Move every expert's bias by the update rate towards an even load, given the (E,) counts of a step."""
        counts = tokens_per_expert.double()  # exact for any count, so that the sign is exact
        self.bias += self.bias_update_rate * torch.sign(counts.mean() - counts).to(self.bias)
