"""Expert choice: every expert picks tokens, so the load is perfectly balanced."""

import torch
from torch import Tensor

from trainer.moe.routers.non_causal import AssignmentRouter
from trainer.ops.select import stable_top_k


class ExpertChoiceRouter(AssignmentRouter):
    """Every expert takes the C tokens of a sequence with its highest probabilities; the earlier token wins a tie.

    Source: Zhou et al. 2022 (arXiv 2202.09368), section 3.2, over each sequence; k is the mean number of experts per
        token, which varies from 0 to E.
    """

    def assign(self, scores: Tensor, *, top_k: int, capacity: int) -> Tensor:
        """Select the top C tokens of each expert."""
        chosen = torch.zeros_like(scores.t(), dtype=torch.bool)
        return chosen.scatter(-1, stable_top_k(scores.t(), capacity), True).t()
