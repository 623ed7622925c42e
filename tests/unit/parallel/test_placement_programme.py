"""Tests for the placement programme: the best of all where all are tried, and else close to its bound."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import eye_array as identity
from scipy.sparse import kron

from trainer.parallel.expert_placement import room_of
from trainer.parallel.placement_programme import LayerPlacement, greedy_placement, rank_loads, solve_placement


def _fewest(loads: Sequence[int], room: Sequence[int]) -> int:
    """Return the rows of the busiest rank in the best of all placements, by trying them all."""
    left, busy, best = list(room), [0] * len(room), [sum(loads)]

    def place(expert: int) -> None:
        if max(busy) >= best[0] and expert:
            return
        if expert == len(loads):
            best[0] = max(busy)
            return
        for rank in range(len(room)):
            if left[rank]:
                left[rank], busy[rank] = left[rank] - 1, busy[rank] + loads[expert]
                place(expert + 1)
                left[rank], busy[rank] = left[rank] + 1, busy[rank] - loads[expert]

    place(0)
    return best[0]


def _check(loads: Sequence[int], room: Sequence[int], found: LayerPlacement) -> None:
    assert [found.owner.count(rank) for rank in range(len(room))] == list(room)
    assert found.busiest == max(rank_loads(loads, found.owner, len(room)))
    contiguous = [rank for rank, number in enumerate(room) for _ in range(number)]
    assert found.bound <= found.busiest <= max(rank_loads(loads, contiguous, len(room))), "never above contiguous"


def test_a_placement_is_the_best_of_all() -> None:
    drawn = random.Random(0)
    for _ in range(200):
        num_ranks = drawn.randint(1, 4)
        num_experts = drawn.randint(num_ranks, 8)
        loads = [drawn.choice([drawn.randrange(6), drawn.randrange(1000)]) for _ in range(num_experts)]
        room = room_of(num_experts, num_ranks)
        found, best = solve_placement(loads, room), _fewest(loads, room)
        _check(loads, room, found)
        assert found.bound <= best <= found.busiest <= best * 1.001, (loads, room)
        _check(loads, room, greedy_placement(loads, room))


def test_the_integer_programme_has_the_same_optimum() -> None:
    """An outside reference: HiGHS, on x (E, G) of 0 and 1, and the load of the busiest rank."""
    drawn = random.Random(1)
    for num_experts, num_ranks in ((12, 4), (11, 3)):
        loads, room = [int(drawn.lognormvariate(5, 1)) for _ in range(num_experts)], room_of(num_experts, num_ranks)
        cells, top = num_experts * num_ranks, np.ones((num_ranks, 1))
        of_rank = kron(np.ones((1, num_experts)), identity(num_ranks)).toarray()  # (G, E G)
        rows_of_rank = np.hstack([kron(np.array([loads]), identity(num_ranks)).toarray(), -top])
        once = np.hstack([kron(identity(num_experts), np.ones((1, num_ranks))).toarray(), np.zeros((num_experts, 1))])
        solved = milp(
            np.eye(cells + 1)[-1],
            integrality=[1] * cells + [0],
            bounds=Bounds(0, [1] * cells + [math.inf]),
            constraints=[
                LinearConstraint(once, 1, 1),
                LinearConstraint(np.hstack([of_rank, 0 * top]), room, room),
                LinearConstraint(rows_of_rank, -np.inf, 0),
            ],
        )
        assert solved.status == 0
        found = solve_placement(loads, room)
        assert round(solved.fun) <= found.busiest <= 1.001 * round(solved.fun)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(64, 8), (128, 64), (256, 32), (60, 8)])
def test_many_experts_are_within_one_percent_of_the_bound(num_experts: int, num_ranks: int) -> None:
    drawn = random.Random(num_experts)
    for loads in (
        [int(1e5 / (e + 1) ** 0.8) for e in range(num_experts)],
        [drawn.randrange(5000, 15000) for _ in range(num_experts)],
        [int(drawn.lognormvariate(8, 0.7)) for _ in range(num_experts)],
    ):
        drawn.shuffle(loads)
        room = room_of(num_experts, num_ranks)
        found = solve_placement(loads, room)
        _check(loads, room, found)
        assert found.busiest <= 1.01 * found.bound


def test_a_search_that_is_given_up_keeps_what_it_has_and_an_honest_bound() -> None:
    loads = [9, 8, 7, 6, 5, 5, 5, 4, 3, 3, 2, 1]
    room = room_of(12, 5)
    full, cut = solve_placement(loads, room), solve_placement(loads, room, max_nodes=0)
    assert cut.busiest == greedy_placement(loads, room).busiest
    assert cut.bound <= full.bound == full.busiest <= cut.busiest


def test_layers_without_tokens_have_a_placement() -> None:
    assert solve_placement([0, 0, 0], [1, 2]) == LayerPlacement(owner=[0, 1, 1], busiest=0, bound=0)
