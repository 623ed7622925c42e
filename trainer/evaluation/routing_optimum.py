"""Compare a router's choice of experts with the optimal one.

The optimum is the linear programme of `ops/assignment.py`: at most k experts per token and C tokens per expert. The
router's choice is first restricted to those limits (each token's k best, then each expert's first C), so that both
solve the same problem and the optimum is an upper bound.

# n tokens of one sequence, k experts per token, E experts, C capacity of an expert.
"""

import operator
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from trainer.ops.assignment import Solution, solve_linear_program
from trainer.ops.select import round_mantissa, stable_top_k


@dataclass(frozen=True, slots=True)
class Optimality:
    """One choice and the optimum; sums over tokens."""

    wanted: int
    """n * k."""
    kept: int
    """Assignments of the router within the limits."""
    optimum_kept: int
    """Assignments of the optimum."""
    score: float
    """Sum of the router's scores over `kept`."""
    optimum: float
    """Largest possible sum."""

    def __add__(self, other: "Optimality") -> "Optimality":
        """Sum over two sequences."""
        return Optimality(*map(operator.add, astuple(self), astuple(other)))

    @property
    def gap(self) -> float:
        """1 - score / optimum: 0 for the best choice."""
        return 1 - self.score / self.optimum if self.optimum > 0 else 0.0

    @property
    def drop_rate(self) -> float:
        """Share of the wanted assignments that exceed capacity."""
        return 1 - self.kept / self.wanted if self.wanted else 0.0

    @property
    def optimum_drop_rate(self) -> float:
        """Drop rate of the optimal choice."""
        return 1 - self.optimum_kept / self.wanted if self.wanted else 0.0


def measure_optimality(
    scores: Tensor, chosen: Tensor, *, top_k: int, capacity: int, num_uncapped: int = 0
) -> tuple[Optimality, Solution]:
    """Compare a choice for one sequence with the optimum; return the optimum with the experts' prices, too.

    `scores` is the (n, E) non-negative value of each token-expert pair, rounded to 12 bits, as routers compare tokens;
    `chosen` is (n, E) bool, before any drops. The last `num_uncapped` experts, null experts, have no capacity limit.
    """
    scores = round_mantissa(scores.detach().double())
    best = solve_linear_program(scores, top_k=top_k, capacity=capacity, num_uncapped=num_uncapped)
    kept = within_capacity(scores, chosen, top_k=top_k, capacity=capacity, num_uncapped=num_uncapped)
    return (
        Optimality(
            wanted=len(scores) * top_k,
            kept=int(kept.sum()),
            optimum_kept=int(best.chosen.sum()),
            score=float(scores[kept].sum()),
            optimum=float(scores[best.chosen].sum()),
        ),
        best,
    )


def within_capacity(scores: Tensor, chosen: Tensor, *, top_k: int, capacity: int, num_uncapped: int = 0) -> Tensor:
    """Return (n, E) bool: each token's k best chosen experts, then each expert's first C tokens.

    The last `num_uncapped` experts keep all their tokens.
    """
    ranked = stable_top_k(scores.masked_fill(~chosen, -torch.inf), min(top_k, scores.shape[1]))  # (n, k)
    kept = torch.zeros_like(chosen).scatter(-1, ranked, True) & chosen
    fits = kept.long().cumsum(0) <= capacity
    fits[:, scores.shape[1] - num_uncapped :] = True
    return kept & fits
