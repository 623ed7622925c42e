"""Tests for placements of experts: as many on each rank under each, and files that are read as they were written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.parallel.expert_placement import (
    ExpertPlacement,
    busiest_over_mean,
    contiguous_placement,
    named_placement,
    placement_by_loads,
    read_placement,
    room_of,
    round_robin_placement,
    write_placement,
)
from trainer.parallel.placement_programme import greedy_placement, solve_placement


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 4), (8, 3), (5, 2), (3, 3), (4, 1)])
def test_every_rank_has_as_many_experts_under_each_placement(num_experts: int, num_ranks: int) -> None:
    loads = [[3 * e % 7 for e in range(num_experts)]] * 2
    for placement in (
        contiguous_placement(2, num_experts, num_ranks),
        round_robin_placement(2, num_experts, num_ranks),
        placement_by_loads(loads, num_ranks, solve_placement)[0],
        placement_by_loads(loads, num_ranks, greedy_placement)[0],
    ):
        for owner in placement.owners:
            assert [owner.count(rank) for rank in range(num_ranks)] == room_of(num_experts, num_ranks)


def test_round_robin_puts_neighbours_on_different_ranks_while_there_is_room() -> None:
    assert round_robin_placement(1, 8, 3).owners == ((0, 1, 2, 0, 1, 2, 1, 2),)
    assert contiguous_placement(1, 8, 3).owners == ((0, 0, 1, 1, 1, 2, 2, 2),)


def test_heavy_experts_are_apart_in_each_layer() -> None:
    loads = [[1, 1, 9, 9, 9], [0, 0, 0, 0, 0]]
    placement, layers = placement_by_loads(loads, 2, solve_placement)
    assert [layer.busiest for layer in layers] == [18, 0] == [layer.bound for layer in layers]
    assert busiest_over_mean(loads, placement) == [18 / 14.5, 1.0]
    assert busiest_over_mean(loads, contiguous_placement(2, 5, 2)) == [27 / 14.5, 1.0]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    placement = ExpertPlacement(num_ranks=2, owners=((0, 1, 1, 0), (1, 1, 0, 0)))
    write_placement(tmp_path / "p.json", placement)
    assert read_placement(tmp_path / "p.json", num_layers=2, num_experts=4, key="parallel.placement") == placement
    assert json.loads((tmp_path / "p.json").read_text()) == {"ep_size": 2, "ranks": [[0, 1, 1, 0], [1, 1, 0, 0]]}
    copies = ((1, 2), (3, 0)), ((0, 1), (3, 2))
    placement = replace(placement, copies=copies)
    write_placement(tmp_path / "p.json", placement)
    assert read_placement(tmp_path / "p.json", num_layers=2, num_experts=4, key="parallel.placement") == placement


def test_without_loads_a_rank_has_copies_of_the_first_experts_of_the_next_ones() -> None:
    assert named_placement("round_robin", 1, 6, 3, num_copies=3).copies == (((1, 4, 2), (2, 5, 0), (0, 3, 1)),)
    assert named_placement("auto", 1, 6, 3) == contiguous_placement(1, 6, 3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[[0, 1]]", "needs ep_size, at most 2, and ranks"),
        ('{"ep_size": 2, "ranks": [[0, 1]]}', "a list of 2 lists"),
        ('{"ep_size": 2, "ranks": [[0, 1], [0, -1]]}', "below ep_size"),
        ('{"ep_size": 2, "ranks": [[0, 1], [0, 2]]}', "below ep_size"),
        ('{"ep_size": 2, "ranks": [[0, 1], [0, true]]}', "below ep_size"),
        ('{"ep_size": 3, "ranks": [[0, 1], [0, 1]]}', "at most 2"),
        ('{"ep_size": 2, "ranks": [[0, 1], [0, 1]], "copies": [[[1], [1]], [[1], [0]]]}', "copies needs 2 lists"),
        ('{"ep_size": 2, "ranks": [[0, 1], [0, 1]], "copies": [[[1], [0]]]}', "copies needs 2 lists"),
        (
            '{"ep_size": 2, "ranks": [[0, 1], [0, 1]], "copies": [[[1], []], [[1], [0]]]}',
            "copies needs 2 lists",
        ),
        ('{"ep_size": 2, "ranks": [[0, 1], [1, 1]]}', r"MoE layer 2 of 2 has \[0, 2\] experts on the ranks; every"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"^parallel\.placement: .*p\.json: .*{problem}"):
        read_placement(tmp_path / "p.json", num_layers=2, num_experts=2, key="parallel.placement")
