"""Greedy heuristic for the programme that `linear_program` solves exactly."""

from torch import Tensor

from trainer.moe.routers.non_causal import SolvingRouter
from trainer.ops.assignment import greedy_assignment


class GreedyRouter(SolvingRouter):
    """Takes (token, expert) pairs by descending probability, while both have capacity left."""

    def assign(self, scores: Tensor, *, top_k: int, capacity: int) -> Tensor:
        """Assign the tokens of one sequence."""
        return greedy_assignment(scores, top_k=top_k, capacity=capacity)
