"""Optimal assignment: the linear programme that other routers are measured against."""

from torch import Tensor

from trainer.moe.routers.non_causal import SolvingRouter
from trainer.ops.assignment import solve_linear_program


class LinearProgramRouter(SolvingRouter):
    """Maximizes the sum of the chosen probabilities, with at most k experts per token and C tokens per expert.

    The 0-1 programme of the first founding document (section 4.2); see `ops/assignment.py`. Solving takes one CPU
    thread about 20 ms for 256 tokens and 8 experts, so it is for small models and as a reference.
    """

    def assign(self, scores: Tensor, *, top_k: int, capacity: int) -> Tensor:
        """Solve the programme of one sequence."""
        return solve_linear_program(scores, top_k=top_k, capacity=capacity).chosen
