"""Tests for the places of experts: one's rows are split evenly, and what is not dispatched stays where it is."""

import torch

from trainer.moe.expert_places import ExpertPlaces
from trainer.moe.routing import RoutingDecision
from trainer.parallel.expert_placement import ExpertPlacement


def _decision(experts: list[int], *, num_experts: int, valid: list[bool] | None = None) -> RoutingDecision:
    index = torch.tensor(experts)[:, None]
    mask = torch.ones(len(experts), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return RoutingDecision.from_top_k(index, torch.ones(index.shape), num_experts=num_experts, valid=mask)


def test_places_are_numbers_in_the_order_of_ranks() -> None:
    copies = (((0,), (0,), (2,)),)
    placement = ExpertPlacement(num_ranks=3, owners=((2, 0, 1, 0, 1, 2),), copies=copies)
    assert [placement.held(0, rank) for rank in range(3)] == [([1, 3], [0]), ([2, 4], [0]), ([0, 5], [2])]
    assert placement.places(0) == [[6, 2, 5], [0], [3, 8], [1], [4], [7]]
    assert placement.num_copies == 1


def test_without_copies_experts_are_renumbered_and_null_experts_are_not() -> None:
    placed = ExpertPlaces([[2], [0], [1]]).placed(_decision([0, 1, 2, 3, 0], num_experts=3))
    assert placed.expert_index.tolist() == [2, 0, 1, 3, 2] and placed.num_experts == 3


def test_rows_of_a_copied_expert_take_turns() -> None:
    """Also if they are not next to each other; padding and null experts take none."""
    places = ExpertPlaces([[3, 1, 5], [0], [4, 2]])
    decision = _decision([0, 2, 0, 0, 1, 3, 0, 2, 0], num_experts=3, valid=[True] * 3 + [False] + [True] * 5)
    placed = places.placed(decision)
    assert placed.expert_index.tolist() == [3, 4, 1, 3, 0, 6, 5, 2, 3]
    assert placed.num_experts == 6 and (placed.kept == decision.kept).all()
    other = ExpertPlaces([[3, 1, 5], [0], [4, 2]], first_turn=1).placed(decision)
    assert other.expert_index.tolist() == [1, 2, 5, 3, 0, 6, 3, 4, 1], "another rank begins with another place"


def test_places_of_an_expert_differ_by_one_row_at_most() -> None:
    drawn = torch.randint(0, 4, (1001,), generator=torch.Generator().manual_seed(0))
    placed = ExpertPlaces([[0, 4, 6], [1], [2, 5], [3]], first_turn=2).placed(_decision(drawn.tolist(), num_experts=4))
    counts = placed.expert_index.bincount(minlength=7)
    for places in ([0, 4, 6], [2, 5]):
        assert counts[places].amax() - counts[places].amin() <= 1
    assert counts.sum() == 1001
