"""Tests for copies of busy experts: as many on each rank, different ones, and the hottest has half as many rows."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from trainer.parallel.copy_experts import place_with_copies
from trainer.parallel.expert_placement import busiest_over_mean, placement_by_loads, room_of
from trainer.parallel.placement_programme import greedy_placement, solve_placement


@pytest.mark.parametrize(("num_experts", "num_ranks", "num_copies"), [(8, 2, 1), (5, 3, 2), (16, 4, 2), (3, 3, 2)])
def test_every_rank_has_as_many_copies_of_different_experts_of_other_ranks(
    num_experts: int, num_ranks: int, num_copies: int
) -> None:
    drawn = random.Random(num_experts)
    for loads in ([int(drawn.lognormvariate(6, 1)) for _ in range(num_experts)], [0] * num_experts):
        for place in (solve_placement, greedy_placement):
            found = place_with_copies(loads, room_of(num_experts, num_ranks), num_copies, place)
            assert [found.owner.count(rank) for rank in range(num_ranks)] == room_of(num_experts, num_ranks)
            for rank, held in enumerate(found.copies):
                assert len(held) == len({*held}) == num_copies and all(found.owner[e] != rank for e in held)
            (placement, (layer,)), total = (
                placement_by_loads([loads], num_ranks, place, num_copies=num_copies),
                sum(loads),
            )
            assert layer == found
            (measured,) = busiest_over_mean([loads], placement)
            assert not total or found.busiest == pytest.approx(measured * total / num_ranks, abs=1), "rounded up"


def test_one_copy_halves_the_rows_of_the_hottest_expert() -> None:
    loads = [1000, 10, 10, 10, 10, 10, 10, 10]
    alone, copied = (place_with_copies(loads, room_of(8, 4), number, solve_placement) for number in (0, 1))
    assert alone.busiest == 1010 and not alone.copies
    assert copied.busiest <= 1010 / 2, "one place of it, or fewer rows still, as every rank has one"
    twice = place_with_copies([600, 600, 0, 0], room_of(4, 2), 1, solve_placement)
    assert twice.busiest == 600 == twice.bound


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "num_copies"), [(16, 4, 2), (64, 8, 2), (128, 16, 2), (64, 32, 1), (128, 64, 1)]
)
def test_skewed_experts_with_copies_are_nearly_even(num_experts: int, num_ranks: int, num_copies: int) -> None:
    loads = [int(1e5 / (e + 1) ** 1.2) for e in range(num_experts)]
    room = room_of(num_experts, num_ranks)
    alone, copied = (place_with_copies(loads, room, number, greedy_placement) for number in (0, num_copies))
    assert alone.busiest > 1.4 * alone.bound
    assert copied.busiest <= 1.01 * copied.bound


@pytest.mark.parametrize(
    ("num_ranks", "num_copies", "loads"),
    [
        (2, 1, [1000, 500, 333, 250, 200, 166]),
        (3, 1, [1000, 500, 333, 250, 200]),
        (3, 2, [817, 29, 640, 1460, 1010, 355]),
        (3, 1, [5210, 170, 1830, 95, 640, 2900, 804]),
    ],
)
def test_copies_are_as_good_as_an_integer_programme_s(num_ranks: int, num_copies: int, loads: list[int]) -> None:
    room = room_of(len(loads), num_ranks)
    found, best = place_with_copies(loads, room, num_copies, solve_placement), _fewest(loads, room, num_copies)
    assert found.bound - 1 <= best <= found.busiest + 0.5 <= 1.01 * best + 2


def _fewest(loads: Sequence[int], room: Sequence[int], num_copies: int) -> float:
    """Return the rows of the busiest rank in the best placement with copies: an outside reference, HiGHS.

    Unknowns of 0 and 1: expert e is on c ranks (E, C), is on rank r as one of c (E, G, C), is rank r's own (E, G).
    """
    num_experts, size = len(loads), len(room)
    numbers = np.arange(num_experts * size * (size + 2))
    of, at, own = np.split(numbers, [num_experts * size, num_experts * size * (size + 1)])
    of, at, own = of.reshape(-1, size), at.reshape(-1, size, size), own.reshape(-1, size)
    top, limits = len(numbers), list[tuple[dict[int, float], float, float]]()
    for e in range(num_experts):
        limits += [(dict.fromkeys(of[e], 1.0), 1, 1), (dict.fromkeys(own[e], 1.0), 1, 1)]
        for c in range(size):
            limits.append((dict.fromkeys(at[e, :, c], 1.0) | {of[e, c]: -1.0 - c}, 0, 0))
            limits += [({at[e, r, c]: 1.0, of[e, c]: -1.0}, -np.inf, 0) for r in range(size)]
        limits += [(dict.fromkeys(at[e, r], -1.0) | {own[e, r]: 1.0}, -np.inf, 0) for r in range(size)]
    for r in range(size):
        limits.append((dict.fromkeys(own[:, r], 1.0), room[r], room[r]))
        limits.append((dict.fromkeys(at[:, r].flatten(), 1.0), room[r] + num_copies, room[r] + num_copies))
        rows = {at[e, r, c]: loads[e] / (c + 1) for e in range(num_experts) for c in range(size)}
        limits.append((rows | {top: -1.0}, -np.inf, 0))
    matrix = np.zeros((len(limits), top + 1))
    for row, (terms, _, _) in zip(matrix, limits, strict=True):
        row[list(terms)] = list(terms.values())
    is_whole = np.r_[np.ones(top), 0]
    solved = milp(
        1 - is_whole,
        integrality=is_whole,
        bounds=Bounds(0, np.where(is_whole, 1, np.inf)),
        constraints=[LinearConstraint(matrix, [low for _, low, _ in limits], [high for _, _, high in limits])],
    )
    assert solved.status == 0
    return float(solved.fun)
