"""Rank order, slices and sizes that do not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.distributed.rank_layout import (
    Degrees,
    Layout,
    check_layout,
    even_slices,
    format_ranks,
    layout_from_environment,
)
from trainer.errors import ConfigError


def test_ep_ranks_are_neighbours_and_rows_of_the_mesh() -> None:
    layouts = [Layout(world_size=6, rank=rank, ep_size=3) for rank in range(6)]
    assert [(layout.edp_rank, layout.ep_rank) for layout in layouts] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert layouts[0].ep_ranks() == [[0, 1, 2], [3, 4, 5]]
    assert layouts[0].edp_ranks() == [[0, 3], [1, 4], [2, 5]]


def test_ep_ranks_on_several_whole_nodes_have_neighbours_and_counterparts() -> None:
    layout = Layout(world_size=8, ep_size=4, ranks_per_node=2)
    assert layout.nodes_of_ep == 2
    assert layout.ep_inside_ranks() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.ep_between_ranks() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    oblong = Layout(world_size=6, ep_size=6, ranks_per_node=3)
    assert oblong.ep_inside_ranks() == [[0, 1, 2], [3, 4, 5]] and oblong.ep_between_ranks() == [[0, 3], [1, 4], [2, 5]]
    for other in (Layout(world_size=8, ep_size=4, ranks_per_node=8), Layout(world_size=6, ep_size=3, ranks_per_node=2)):
        assert other.nodes_of_ep == 1 and other.ep_inside_ranks() == other.ep_ranks()


def test_a_stage_is_a_world_of_its_own_layers() -> None:
    layout = Layout(world_size=8, rank=6, pp_size=2, ep_size=2, cp_size=2)
    assert layout.stage_ranks() == [[0, 1, 2, 3], [4, 5, 6, 7]] and layout.stage_size == 4
    assert (layout.pp_rank, layout.data_rank, layout.data_size, layout.edp_rank) == (1, 1, 2, 1)
    assert layout.pp_ranks() == [[0, 4], [1, 5], [2, 6], [3, 7]] == layout.tied_ranks()
    assert layout.ep_ranks() == [[0, 1], [2, 3], [4, 5], [6, 7]] == layout.cp_ranks()
    assert layout.edp_ranks() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.shard_ranks() == layout.stage_ranks() and [4] in layout.shard_copy_ranks()
    halves = Layout(world_size=8, pp_size=2, shard_size=2)
    assert halves.shard_copy_ranks() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    three = Layout(world_size=3, pp_size=3)
    assert three.tied_ranks() == [[0, 2], [1]]
    assert Layout(world_size=2, pp_size=2, pp_schedule="zbv").tied_ranks() == [[0], [1]]


def test_degrees_divide_the_ranks_of_a_stage() -> None:
    check_layout(Degrees(pp_size=2, ep_size=2), world_size=4)
    with pytest.raises(ConfigError, match=r"parallel\.pp_size: 3 does not divide the 4 ranks that were started"):
        check_layout(Degrees(pp_size=3), world_size=4)
    with pytest.raises(ConfigError, match=r"ep_size: 4 does not divide the 2 ranks of a stage; use one of 1, 2"):
        check_layout(Degrees(pp_size=2, ep_size=4), world_size=4)


@given(st.integers(0, 50), st.integers(1, 12))
def test_slices_cover_everything_once_and_differ_by_at_most_one(total: int, parts: int) -> None:
    bounds = even_slices(total, parts)
    assert [i for first, end in bounds for i in range(first, end)] == list(range(total))
    sizes = [end - first for first, end in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_a_degree_that_does_not_divide_names_both_numbers_and_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert layout_from_environment(Degrees(ep_size=3)) == Layout(world_size=6, rank=4, ep_size=3, ranks_per_node=6)
    with pytest.raises(ConfigError) as error:
        layout_from_environment(Degrees(ep_size=4))
    assert str(error.value) == (
        "parallel.ep_size: 4 does not divide the 6 ranks that were started; use one of 1, 2, 3, 6, or start a multiple "
        "of 4 (torchrun --nproc-per-node, --nnodes)"
    )


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert layout_from_environment(Degrees()) == Layout()


def test_ranks_in_words() -> None:
    assert [format_ranks([3]), format_ranks([0, 2]), format_ranks([0, 2, 5])] == [
        "rank 3",
        "ranks 0 and 2",
        "ranks 0, 2 and 5",
    ]


@pytest.mark.parametrize(
    ("ep_size", "shard_size", "dense", "experts"),
    [
        (1, 4, [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, 4, [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2], [4, 6], [1, 3], [5, 7]]),
        (4, 2, [[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [4], [1], [5], [2], [6], [3], [7]]),
        (2, None, [[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_neighbours_share_a_copy(
    ep_size: int, shard_size: int | None, dense: list[list[int]], experts: list[list[int]]
) -> None:
    layout = Layout(world_size=8, ep_size=ep_size, shard_size=shard_size)
    assert layout.shard_ranks() == dense and layout.edp_shard_ranks() == experts
    assert [rank for column in layout.shard_copy_ranks() for rank in column] == [
        row[i] for i in range(len(dense[0])) for row in dense
    ]
    for column in layout.edp_shard_copy_ranks():
        assert len({rank % ep_size for rank in column}) == 1 and len(column) * len(experts[0]) == 8 // ep_size


@pytest.mark.parametrize(
    ("world_size", "ep_size", "shard_size", "fitting"),
    [
        (8, 1, 3, "2, 4, 8, or null for all ranks"),
        (12, 4, 6, "2, 4, 12, or null for all ranks"),
        (6, 1, 12, "2, 3, 6, or null for all ranks"),
        (1, 1, 2, "null"),
    ],
)
def test_a_shard_size_that_does_not_fit_is_refused(
    world_size: int, ep_size: int, shard_size: int, fitting: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_layout(Degrees(ep_size=ep_size, shard_size=shard_size), world_size=world_size)
    assert str(refused.value) == (
        f"parallel.shard_size: {shard_size} must divide the {world_size} ranks that were started, and divide or be a "
        f"multiple of ep_size {ep_size}; use {fitting}"
    )


def test_ranks_that_share_rows_are_neighbours_whatever_experts_they_have() -> None:
    layouts = [Layout(world_size=8, rank=rank, ep_size=4, cp_size=2) for rank in range(8)]
    assert layouts[0].cp_ranks() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [(layout.data_rank, layout.row_rank) for layout in layouts[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {layout.data_size for layout in layouts} == {4} and layouts[5].ep_ranks() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    check_layout(Degrees(ep_size=2, cp_size=4), world_size=8)
    with pytest.raises(ConfigError, match="cp_size: 3 does not divide the 8 ranks that were started"):
        check_layout(Degrees(cp_size=3), world_size=8)


def test_ranks_that_share_heads_are_neighbours_among_those_that_share_rows() -> None:
    layouts = [Layout(world_size=8, rank=rank, tp_size=2, cp_size=2, ep_size=4) for rank in range(8)]
    layout = layouts[0]
    assert layout.tp_ranks() == [[0, 1], [2, 3], [4, 5], [6, 7]] and layout.row_ranks() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.cp_ranks() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.tdp_ranks() == [[0, 2, 4, 6], [1, 3, 5, 7]] == layout.tdp_shard_ranks()
    assert [(one.data_rank, one.row_rank) for one in layouts] == [(i // 4, i % 4) for i in range(8)]
    halves = Layout(world_size=8, tp_size=2, shard_size=4)
    assert halves.tdp_shard_ranks() == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert halves.tdp_shard_copy_ranks() == [[0, 4], [2, 6], [1, 5], [3, 7]]
    alone = Layout(world_size=4, tp_size=4, shard_size=2)
    assert alone.tdp_shard_ranks() == [[0], [1], [2], [3]] == alone.tdp_shard_copy_ranks()
    stages = Layout(world_size=8, pp_size=2, tp_size=2)
    assert stages.tdp_ranks() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_tensor_parallel_ranks_fit_those_that_share_rows_and_weights() -> None:
    check_layout(Degrees(tp_size=2, cp_size=2, shard_size=2), world_size=4)
    with pytest.raises(ConfigError, match="tp_size: 3 does not divide the 4 ranks that were started"):
        check_layout(Degrees(tp_size=3), world_size=4)
    with pytest.raises(ConfigError, match="tp_size: 2 times cp_size 4 ranks share rows, which does not divide the 4 r"):
        check_layout(Degrees(tp_size=2, cp_size=4), world_size=4)
    with pytest.raises(ConfigError, match="be a multiple of ep_size 1, and of tp_size 4; use 2, 4, 12, or null"):
        check_layout(Degrees(tp_size=4, shard_size=3), world_size=12)
