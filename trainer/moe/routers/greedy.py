"""The greedy heuristic for the programme that `linear_program` solves."""

from torch import Tensor

from trainer.moe.routers.non_causal import AssignmentRouter
from trainer.ops.assignment import greedy


class GreedyRouter(AssignmentRouter):
    """Takes pairs of token and expert by falling probability while both have room; source: as `linear_program`."""

    def assign(self, scores: Tensor, *, top_k: int, room: int) -> Tensor:
        """Fill one sequence's experts."""
        return greedy(scores, top_k=top_k, room=room)
