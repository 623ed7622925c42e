"""Assignments of tokens to experts that have room for so many: the best one, the greedy one, and a balanced plan.

The programme, whose 0-1 form is the first founding document's (section 4.2):

    maximise  sum over t, e of score_te x_te
    subject to  sum_e x_te <= k      each token has k experts at most
                sum_t x_te <= C      each expert has room for C tokens
                0 <= x_te <= 1

Its matrix is the incidence matrix of a bipartite graph, which is totally unimodular: the vertices of the linear
programme are integral, so its solution is the solution of the 0-1 programme (Hoffman and Kruskal 1956). The dual price
of an expert's room lies between what one more place would add and what one place fewer would cost; with prices v, every
token's best k by score - v are a solution (but for ties), so -v is what the bias of a bias-balanced router should be.

# n tokens, E experts, k experts per token, C places per expert.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.packages import importing


@dataclass(frozen=True, slots=True)
class Solution:
    """The best assignment and what it says about the experts."""

    chosen: Tensor
    """(n, E) bool."""
    prices: Tensor
    """(E,) float64, not negative: what a place at an expert is worth in the sum of scores, at the margin."""


def solve_linear_program(scores: Tensor, *, top_k: int, capacity: int, num_uncapped: int = 0) -> Solution:
    """Solve the programme exactly, with HiGHS' dual simplex.

    Args:
        scores: (n, E), none below 0: then no place stays empty that could be filled with a score above 0.
        top_k: k.
        capacity: C.
        num_uncapped: how many of the E, the last ones, accept every token; their price is 0.
    """
    with importing("scipy", user="the linear programme"):  # here: most runs solve nothing, and the import is slow
        from scipy.optimize import linprog
        from scipy.sparse import eye_array as identity
        from scipy.sparse import kron, vstack

    n, num_experts = scores.shape
    if n == 0:
        return Solution(torch.zeros_like(scores, dtype=torch.bool), torch.zeros(num_experts, dtype=torch.float64))
    of_tokens = kron(identity(n), np.ones((1, num_experts)))  # (n, n E)
    of_experts = kron(np.ones((1, n)), identity(num_experts))  # (E, n E)
    limits = np.concatenate([np.full(n, float(top_k)), np.full(num_experts, float(capacity))])
    limits[n + num_experts - num_uncapped :] = n + 1  # one more than ever come, so that the price is 0 and nothing else
    solved = linprog(
        -_finite(scores).ravel(),
        A_ub=vstack([of_tokens, of_experts], format="csr"),
        b_ub=limits,
        bounds=(0, 1),
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if solved.status != 0:
        raise ArithmeticError(f"the linear programme of {n} tokens and {num_experts} experts: {solved.message}")
    chosen = torch.from_numpy(solved.x.reshape(n, num_experts) > 0.5)
    prices = torch.from_numpy(-np.asarray(solved.ineqlin.marginals)[n:]).clamp(min=0)
    return Solution(chosen.to(scores.device), prices)


def greedy_assignment(scores: Tensor, *, top_k: int, capacity: int) -> Tensor:
    """Return (n, E) bool: pairs by falling score, each taken if its token and its expert still have room.

    Equal scores go by token, then by expert. At least half of the best sum (Jenkyns 1976: the pairs that fit are the
    intersection of two matroids).
    """
    n, num_experts = scores.shape
    order = scores.detach().flatten().sort(descending=True, stable=True).indices.tolist()
    wants, has_room = [top_k] * n, [capacity] * num_experts
    taken = []
    for pair in order:
        token, expert = divmod(pair, num_experts)
        if wants[token] and has_room[expert]:
            wants[token] -= 1
            has_room[expert] -= 1
            taken.append(pair)
    chosen = torch.zeros(n * num_experts, dtype=torch.bool, device=scores.device)
    chosen[taken] = True
    return chosen.view(n, num_experts)


def balanced_assignment(scores: Tensor) -> Tensor:
    """Return (n,) int64: one expert for each token, ceil(n / E) tokens for an expert at most, at the best sum.

    Args:
        scores: (n, E), of any sign.
    """
    with importing("scipy", user="the balanced assignment"):
        from scipy.optimize import linear_sum_assignment

    n, num_experts = scores.shape
    places = -(-n // num_experts)
    value = _finite(scores).repeat(places, axis=1)  # (n, E * places), an expert's side by side
    _, place = linear_sum_assignment(value, maximize=True)
    return torch.from_numpy(place // max(1, places)).to(scores.device)


def _finite(scores: Tensor) -> NDArray[np.float64]:
    """Return scores for a solver, which refuses what is not finite: such a step is skipped, whatever is chosen."""
    return scores.detach().double().nan_to_num(0.0, 0.0, 0.0).cpu().numpy()


def transport_plan(logits: Tensor, valid: Tensor, *, iterations: int) -> Tensor:
    """Return (B, S, E) log of a plan that moves each sequence's tokens evenly onto experts (Sinkhorn and Knopp 1967).

    exp(logits) is scaled by rows and columns in turn: tokens end up with equal sums, and experts as well. In logarithms
    and float64, with a fixed number of rounds: a sequence's plan does not depend on its neighbours in the batch.

    Args:
        logits: (B, S, E).
        valid: (B, S) bool; other tokens have no mass, and -inf in the plan.
        iterations: rounds.
    """
    plan = logits.detach().double().masked_fill(~valid[..., None], -torch.inf)
    num_valid = valid.sum(1).clamp(min=1).double()[:, None, None]
    for _ in range(iterations):
        plan = plan - plan.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)  # columns: an equal share each
        plan = plan + (num_valid / plan.shape[-1]).log()
        plan = plan - plan.logsumexp(2, keepdim=True).nan_to_num(neginf=0.0)  # rows: every token once
    return plan
