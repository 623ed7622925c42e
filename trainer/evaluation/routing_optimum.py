"""Measure a choice of experts against the optimal one.

The yardstick is the programme of `ops/assignment.py`: k experts for a token and room for C tokens at an expert. A
router's choice is first cut down to what the programme allows, a token's best k and an expert's first C, so that both
are answers to the same question and the optimum cannot be beaten.

# n tokens of one sequence, k experts per token, E experts, C places per expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.ops.assignment import Solution, solve_linear_program
from trainer.ops.select import round_mantissa, stable_top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One choice beside the optimum; sums over tokens."""

    wanted: int
    """n * k."""
    kept: int
    """Assignments that the router's choice keeps."""
    optimum_kept: int
    """Assignments of the optimum."""
    score: float
    """Sum of the scores that are kept."""
    optimum: float
    """Largest sum that there is."""

    def __add__(self, other: "Measured") -> "Measured":
        """Add up two sequences."""
        return Measured(
            wanted=self.wanted + other.wanted,
            kept=self.kept + other.kept,
            optimum_kept=self.optimum_kept + other.optimum_kept,
            score=self.score + other.score,
            optimum=self.optimum + other.optimum,
        )

    @property
    def gap(self) -> float:
        """1 - score / optimum: 0 for the best choice."""
        return 1 - self.score / self.optimum if self.optimum > 0 else 0.0

    @property
    def drop_rate(self) -> float:
        """Share of the wanted assignments that found no room."""
        return 1 - self.kept / self.wanted if self.wanted else 0.0

    @property
    def optimum_drop_rate(self) -> float:
        """Drop rate of the optimal choice."""
        return 1 - self.optimum_kept / self.wanted if self.wanted else 0.0


def measure(scores: Tensor, chosen: Tensor, *, top_k: int, room: int, num_free: int = 0) -> tuple[Measured, Solution]:
    """Measure a choice for one sequence.

    Args:
        scores: (n, E) what a pair of token and expert is worth, none below 0; to 12 bits, as routers compare tokens.
        chosen: (n, E) bool, the router's choice before any drops.
        top_k: k.
        room: C.
        num_free: how many of the experts, the last ones, have room for every token: null experts.

    Returns:
        The measurement, and the optimum with the experts' prices.
    """
    scores = round_mantissa(scores.detach().double())
    best = solve_linear_program(scores, top_k=top_k, capacity=room, num_uncapped=num_free)
    kept = within_room(scores, chosen, top_k=top_k, room=room, num_free=num_free)
    return (
        Measured(
            wanted=len(scores) * top_k,
            kept=int(kept.sum()),
            optimum_kept=int(best.chosen.sum()),
            score=float(scores[kept].sum()),
            optimum=float(scores[best.chosen].sum()),
        ),
        best,
    )


def within_room(scores: Tensor, chosen: Tensor, *, top_k: int, room: int, num_free: int = 0) -> Tensor:
    """Return (n, E) bool: of each token's chosen experts the k best, of each expert's tokens then the first C.

    The last `num_free` experts have room for all.
    """
    ranked = stable_top_k(scores.masked_fill(~chosen, -torch.inf), min(top_k, scores.shape[1]))  # (n, k)
    kept = torch.zeros_like(chosen).scatter(-1, ranked, True) & chosen
    has_place = kept.long().cumsum(0) <= room
    has_place[:, scores.shape[1] - num_free :] = True
    return kept & has_place
