"""Capacity-constrained assignment of tokens to experts: optimal, greedy, and by a balanced transport plan.

The linear programme (its 0-1 form is in the first founding document, section 4.2):

    maximise  sum over t, e of score_te x_te
    subject to  sum_e x_te <= k      at most k experts per token
                sum_t x_te <= C      at most C tokens per expert
                0 <= x_te <= 1

Its constraint matrix is the incidence matrix of a bipartite graph, which is totally unimodular. The vertices of the
feasible set are therefore integral, and its solution also solves the 0-1 programme (Hoffman and Kruskal 1956). The dual
price v_e of an expert's capacity lies between the gain of one more slot and the cost of one fewer. Up to ties, each
token's top k by score - v is a solution, so -v is the ideal selection bias of a bias-balanced router.

# n tokens, E experts, k experts per token, C capacity of an expert.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.packages import importing


@dataclass(frozen=True, slots=True)
class Solution:
    """Optimal assignment, and the dual prices of the experts' capacity."""

    chosen: Tensor
    """(n, E) bool."""
    prices: Tensor
    """(E,) float64, non-negative: marginal gain in the sum of scores per unit of capacity."""


def solve_linear_program(scores: Tensor, *, top_k: int, capacity: int, num_uncapped: int = 0) -> Solution:
    """Solve the programme exactly, by the dual simplex of HiGHS.

    Args:
        scores: (n, E), non-negative, so that no slot stays empty that a positive score could fill.
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
    limits[n + num_experts - num_uncapped :] = n + 1  # never binding, so that the price is exactly 0
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
    """Return (n, E) bool: pairs by descending score, each taken while its token and its expert have capacity left.

    Ties are broken by token, then by expert. The sum is at least half of the optimum (Jenkyns 1976: feasible sets are
    the intersection of two matroids).
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
    """Return (n,) int64: one expert per token, at most ceil(n / E) tokens per expert, at the maximum sum of scores."""
    with importing("scipy", user="the balanced assignment"):
        from scipy.optimize import linear_sum_assignment

    n, num_experts = scores.shape
    places = -(-n // num_experts)
    value = _finite(scores).repeat(places, axis=1)  # (n, E * places), an expert's slots are adjacent
    _, place = linear_sum_assignment(value, maximize=True)
    return torch.from_numpy(place // max(1, places)).to(scores.device)


def _finite(scores: Tensor) -> NDArray[np.float64]:
    """Return scores for a solver, which refuses non-finite values; a step that has any is skipped in any case."""
    return scores.detach().double().nan_to_num(0.0, 0.0, 0.0).cpu().numpy()


def transport_plan(logits: Tensor, valid: Tensor, *, iterations: int) -> Tensor:
    """Return (B, S, E): the log of a transport plan of each sequence's tokens to experts (Sinkhorn and Knopp 1967).

    Rows and columns of exp(logits) are scaled in turn until all tokens have equal sums, and all experts too. In the log
    domain and float64, with a fixed number of iterations, so that a sequence's plan does not depend on the batch.

    Args:
        logits: (B, S, E).
        valid: (B, S) bool; padding has no mass, and -inf in the plan.
        iterations: scalings of rows and columns.
    """
    plan = logits.detach().double().masked_fill(~valid[..., None], -torch.inf)
    num_valid = valid.sum(1).clamp(min=1).double()[:, None, None]
    for _ in range(iterations):
        plan = plan - plan.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)  # columns: equal shares
        plan = plan + (num_valid / plan.shape[-1]).log()
        plan = plan - plan.logsumexp(2, keepdim=True).nan_to_num(neginf=0.0)  # rows: 1 per token
    return plan
