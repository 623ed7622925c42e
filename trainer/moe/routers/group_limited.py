"""Top-k within each token's best expert groups, which limits how many nodes a token is sent to."""

from typing import Any, Literal

import torch
from torch import Tensor

from trainer.moe.routers.bias_balanced import BiasBalancedRouter
from trainer.ops.select import stable_top_k

# T tokens, E experts, G groups of E / G consecutive experts, n null experts.


class GroupLimitedRouter(BiasBalancedRouter):
    """Selects the best-scored groups of each token, then its top k experts among them.

    Group scores include the bias, if any. Null experts belong to no group and can always be selected.

    Source: DeepSeek-V2 (arXiv 2405.04434) scores a group by its best expert, DeepSeek-V3 (arXiv 2412.19437) by the sum
        of its best two, which is k divided by the groups kept (8 experts in 4 groups).
    """

    def __init__(
        self, *, groups: int, groups_kept: int, group_score: Literal["best", "best_two"], **bias_balanced_arguments: Any
    ) -> None:
        super().__init__(**bias_balanced_arguments)
        self.groups, self.groups_kept = groups, groups_kept
        self.experts_scored = min(2 if group_score == "best_two" else 1, self.num_experts // groups)

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Return the biased scores, -inf outside the selected groups (not 0: biased scores can be negative)."""
        biased = super().selection_scores(scores)
        grouped = biased[:, : self.num_experts].unflatten(-1, (self.groups, -1))  # (T, G, E / G)
        group_score = grouped.topk(self.experts_scored, dim=-1).values.sum(-1)  # (T, G)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(-1, stable_top_k(group_score, self.groups_kept), True)
        limited = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        return torch.cat([limited, biased[:, self.num_experts :]], dim=-1)
