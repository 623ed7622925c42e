"""Ranks that plan a save by groups write every part once, under every layout, and rank 0 knows all parts."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from trainer.checkpoint import plan_together as module
from trainer.checkpoint.plan import SavePlan
from trainer.checkpoint.plan_together import plan_together
from trainer.checkpoint.state import Slice, TrainState
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.errors import CheckpointError

RANKS = 4


def expert_slice(mesh: Mesh, *, kind: str) -> Slice:
    """Return this rank's 2 of 4 experts: consecutive, placed apart, or half of these if they are sharded."""
    first = 2 * mesh.ep.index
    if kind == "sharded":
        first += mesh.edp_shard.index
        return Slice(tensor=torch.zeros(1, 3), global_shape=(4, 3), start=first)
    whole = Slice(tensor=torch.zeros(2, 3), global_shape=(4, 3), start=first)
    return whole.at((mesh.ep.index, mesh.ep.index + 2)) if kind == "apart" else whole


def state_of(mesh: Mesh, kind: str) -> TrainState:
    """Return a state with copies of dense tensors, or shards of them, and experts."""
    slices = {f"model.copied.{i}": Slice.whole(torch.zeros(5 + i, 2)) for i in range(RANKS)}
    slices |= {"model.scalar": Slice.whole(torch.zeros(())), "model.empty": Slice.whole(torch.zeros(0, 4))}
    start, end = 6 * mesh.shard.index // mesh.shard.size, 6 * (mesh.shard.index + 1) // mesh.shard.size
    slices["model.sharded"] = Slice(tensor=torch.zeros(end - start, 2), global_shape=(6, 2), start=start)
    for name in ("model.w", "optim.exp_avg.w", "optim.exp_avg_sq.w"):
        slices[name] = expert_slice(mesh, kind=kind)
    return TrainState(slices=slices)


def planned(kind: str, shard_size: int | None, forced: bool) -> tuple[dict[str, Any], list[Any], dict[int, Any], int]:
    mesh = mesh_here(ep_size=2, shard_size=shard_size)
    state, gathers = state_of(mesh, kind), Group.all_gather_objects
    with patch.object(Group, "all_gather_objects", autospec=True, side_effect=gathers) as gathered:
        if forced:
            with patch.object(module, "have_same_tensors", lambda *_: False):
                plan: SavePlan = plan_together(state, mesh)
        else:
            plan = plan_together(state, mesh)
    return plan.parts, plan.of_rank(mesh.layout.rank), plan.sizes_by_rank(), gathered.call_count


@pytest.mark.parametrize(("kind", "shard_size"), [("even", None), ("apart", 2), ("sharded", None)])
def test_every_part_is_written_once_and_known_to_rank_0(ranks: Ranks, kind: str, shard_size: int | None) -> None:
    by_groups = ranks.run(RANKS, planned, kind, shard_size, False)
    parts, _, sizes, _ = by_groups[0]
    for rank, (_, mine, own_sizes, num_gathers) in enumerate(by_groups):
        assert num_gathers == 0, "no rank but the first receives what others hold"
        assert mine == [(name, part) for name, of_name in parts.items() for part in of_name if part.rank == rank]
        assert own_sizes.get(rank) == sizes.get(rank)
    (by_all, *_), *_ = ranks.run(RANKS, planned, kind, shard_size, True)
    assert {name: [part[1:] for part in of_name] for name, of_name in parts.items()} == {
        name: [part[1:] for part in of_name] for name, of_name in by_all.items()
    }
    dense = sorted(part.rank for i in range(RANKS) for part in parts[f"model.copied.{i}"])
    assert dense == list(range(RANKS)), "copies are shared out evenly"


def planned_with_stages(forced: bool) -> tuple[dict[str, Any], list[Any], int]:
    """Plan a state whose layers are on two stages, with experts of each, and an embedding on both."""
    mesh = mesh_here(ep_size=2, pp_size=2)
    stage, gathers = mesh.layout.pp_rank, Group.all_gather_objects
    slices = {"model.tied": Slice.whole(torch.zeros(7, 2)), f"model.copied.{stage}": Slice.whole(torch.zeros(5, 2))}
    for name in (f"model.w{stage}", f"optim.exp_avg.w{stage}", f"optim.exp_avg_sq.w{stage}"):
        slices[name] = expert_slice(mesh, kind="even")
    even = module._is_even if not forced else lambda *_: False
    with (
        patch.object(Group, "all_gather_objects", autospec=True, side_effect=gathers) as gathered,
        patch.object(module, "_is_even", even),
    ):
        plan = plan_together(TrainState(slices=slices), mesh)
    return plan.parts, plan.of_rank(mesh.layout.rank), gathered.call_count


def test_stages_plan_by_themselves_and_write_what_two_of_them_hold_once(ranks: Ranks) -> None:
    by_stages = ranks.run(RANKS, planned_with_stages, False)
    parts = by_stages[0][0]
    for rank, (_, mine, num_gathers) in enumerate(by_stages):
        assert num_gathers == 0, "no rank but the first receives what others hold"
        assert mine == [(name, part) for name, of_name in parts.items() for part in of_name if part.rank == rank]
    (by_all, *_), *_ = ranks.run(RANKS, planned_with_stages, True)
    assert {name: [part[1:] for part in of_name] for name, of_name in parts.items()} == {
        name: [part[1:] for part in of_name] for name, of_name in by_all.items()
    }
    assert {part.rank for part in parts["model.tied"]} <= {0, 1} and {part.rank for part in parts["model.w1"]} == {2, 3}


def stage_without_moments() -> str:
    """Return the error if the experts of the second stage have no moments."""
    mesh = mesh_here(ep_size=2, pp_size=2)
    stage = mesh.layout.pp_rank
    names = [f"model.w{stage}", *(f"optim.{moment}.w{stage}" for moment in ("exp_avg", "exp_avg_sq") if stage == 0)]
    whole = expert_slice(mesh, kind="even")
    experts = Slice(tensor=whole.tensor, global_shape=(4, 3), start=whole.start, is_of_experts=True)
    with pytest.raises(CheckpointError) as error:
        plan_together(TrainState(slices={name: experts if name[0] == "m" else whole for name in names}), mesh)
    return str(error.value)


def test_an_error_of_one_stage_is_that_of_all(ranks: Ranks) -> None:
    errors = ranks.run(RANKS, stage_without_moments)
    assert len(set(errors)) == 1 and errors[0].startswith("not saved: optim.exp_avg.w1 of [4, 3]"), errors


def plan_without(missing: str) -> str:
    """Return the error if rank 3 alone holds another part than its copies, or rank 1 lacks a tensor's moments."""
    mesh = mesh_here(ep_size=2)
    slices = dict(state_of(mesh, "even").slices)
    if missing == "part" and mesh.layout.rank % 2:
        slices["model.w"] = Slice(tensor=torch.zeros(1, 3), global_shape=(4, 3), start=2)
    if missing == "moment":
        slices = {name: part for name, part in slices.items() if name != "optim.exp_avg.w"}
        slices["model.w"] = Slice(
            tensor=slices["model.w"].tensor, global_shape=(4, 3), start=slices["model.w"].start, is_of_experts=True
        )
    with pytest.raises(CheckpointError) as error:
        plan_together(TrainState(slices=slices), mesh)
    return str(error.value)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("part", "model.w: not saved: indices 3 to 3 of 4 are missing"),
        ("moment", "not saved: optim.exp_avg.w of [4, 3]"),
    ],
)
def test_a_part_that_no_rank_holds_is_an_error_on_every_rank(ranks: Ranks, missing: str, said: str) -> None:
    errors = ranks.run(RANKS, plan_without, missing)
    assert len(set(errors)) == 1 and errors[0].startswith(said), errors
