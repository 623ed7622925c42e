"""Expert choice: every expert picks tokens, so the load is perfectly balanced."""

from torch import Tensor

from trainer.moe.routers.non_causal import AssignmentRouter, sequence_capacities
from trainer.ops.select import best_of_rows


class ExpertChoiceRouter(AssignmentRouter):
    """Every expert takes the C tokens of a sequence with its highest probabilities; the earlier token wins a tie.

    Source: Zhou et al. 2022 (arXiv 2202.09368), section 3.2, over each sequence; k is the mean number of experts per
        token, which varies from 0 to E.
    """

    def assign_rows(self, scores: Tensor, valid: Tensor, *, top_k: int) -> Tensor:
        """Select the top C tokens of each expert and sequence."""
        capacity = sequence_capacities(valid, scores.shape[-1], top_k=top_k, factor=self.capacity_factor)
        return best_of_rows(scores, valid, capacity)
