"""Tests for copies of busy experts: as many on each rank, different ones, and the hottest has half as many rows."""

import random

import pytest

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


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(16, 4), (64, 8), (128, 16)])
def test_with_two_copies_on_each_rank_skewed_experts_are_nearly_even(num_experts: int, num_ranks: int) -> None:
    loads = [int(1e5 / (e + 1) ** 1.2) for e in range(num_experts)]
    room = room_of(num_experts, num_ranks)
    alone, copied = (place_with_copies(loads, room, number, greedy_placement) for number in (0, 2))
    assert alone.busiest > 1.4 * alone.bound
    assert copied.busiest <= 1.01 * copied.bound
