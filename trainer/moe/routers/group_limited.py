"""Top-k within a token's best groups of experts: few groups, few nodes to send the token to."""

import torch
from torch import Tensor

from trainer.moe.routers.bias_balanced import BiasBalancedRouter
from trainer.moe.routers.config.token_choice import GroupLimitedRouterConfig
from trainer.ops.select import stable_top_k

# T tokens, E experts, G groups of E / G neighbouring experts, n null experts.


class GroupLimitedRouter(BiasBalancedRouter):
    """Keeps the groups that score best for a token, and its k best experts within them.

    The bias, where there is one, counts in the score of a group as in that of an expert. Null experts are in no group:
    every token may choose them.

    Source: DeepSeek-V2 (arXiv 2405.04434) scores a group by its best expert; V3 (arXiv 2412.19437) by its best two, as
    many as a kept group has of the 8 experts in 4 groups there.
    """

    def __init__(self, config: GroupLimitedRouterConfig, *, d_model: int, num_experts: int, layer: int) -> None:
        super().__init__(config, d_model=d_model, num_experts=num_experts, layer=layer)
        self.groups, self.groups_kept = config.groups, config.groups_kept
        self.scored_by = min(2 if config.group_score == "best_two" else 1, num_experts // config.groups)

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Return the biased scores, -inf outside a token's best groups: a biased score can be below 0."""
        biased = super().selection_scores(scores)
        grouped = biased[:, : self.num_experts].unflatten(-1, (self.groups, -1))  # (T, G, E / G)
        group_score = grouped.topk(self.scored_by, dim=-1).values.sum(-1)  # (T, G)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(-1, stable_top_k(group_score, self.groups_kept), True)
        limited = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        return torch.cat([limited, biased[:, self.num_experts :]], dim=-1)
