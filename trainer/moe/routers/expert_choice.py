"""Experts choose tokens: perfect balance, and some tokens are chosen by many experts and some by none."""

import torch
from torch import Tensor

from trainer.moe.routers.non_causal import AssignmentRouter
from trainer.ops.select import stable_top_k


class ExpertChoiceRouter(AssignmentRouter):
    """Every expert takes the C tokens of the sequence with the highest probability for it, the earlier of equals.

    Source: Zhou et al. 2022 (arXiv 2202.09368), section 3.2, over each sequence; k is the mean number of experts.
    """

    def assign(self, scores: Tensor, *, top_k: int, room: int) -> Tensor:
        """Choose columns by column."""
        chosen = torch.zeros_like(scores.t(), dtype=torch.bool)
        return chosen.scatter(-1, stable_top_k(scores.t(), room), True).t()
