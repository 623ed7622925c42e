"""The best assignment that there is: the optimum that other routers are measured against."""

from torch import Tensor

from trainer.moe.routers.non_causal import AssignmentRouter
from trainer.ops.assignment import linear_program


class LinearProgramRouter(AssignmentRouter):
    """Maximises the sum of the chosen probabilities, k experts for a token and C tokens for an expert at most.

    The first founding document names this 0-1 programme (section 4.2) without writing it down; see `ops/assignment.py`.
    Solving takes a CPU thread about 20 ms for 256 tokens and 8 experts: for small models, and as a yardstick.
    """

    def assign(self, scores: Tensor, *, top_k: int, room: int) -> Tensor:
        """Solve the programme of one sequence."""
        return linear_program(scores, top_k=top_k, room=room).chosen
