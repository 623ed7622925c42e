"""Let the ranks plan a save together: each plans its own part of it, from what the ranks with copies of it agree on.

What every rank receives does not grow with the ranks. Rank 0 receives the parts of all, which the manifest lists, and
what each stage of a pipeline holds.

# N tensors of a state.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trainer.checkpoint.coverage import partition_error
from trainer.checkpoint.plan import (
    Placement,
    SavePlan,
    StatePart,
    check_moments,
    has_moments,
    local_placements,
    plan_save,
)
from trainer.checkpoint.state import TrainState
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.ops.noise import stable_hash


def plan_together(state: TrainState, mesh: Mesh) -> SavePlan:
    """Plan a save, as `plan_save` does; the plan has the parts of all ranks on rank 0, and a rank's own elsewhere.

    Collective. An engine whose copies are not where the mesh has them is planned by the placements of all ranks.

    Raises:
        CheckpointError: if the ranks together do not hold the whole state; on every rank.
    """
    placements, host = local_placements(state), mesh.host
    if _is_even(placements, mesh):
        plan = _plan_by_groups(placements, mesh)
        if not host.any(host.index == 0 and not _covers(plan)):
            return plan
    gathered = host.all_gather_objects(placements)
    return plan_save([{name: Placement(*values) for name, values in held.items()} for held in gathered])


def have_same_tensors(placements: Mapping[str, Placement], group: Group) -> bool:
    """Return whether all ranks hold parts of the same tensors, in the same order. Collective."""
    return group.agrees([[name, *place[2:6]] for name, place in placements.items()])


def _is_even(placements: Mapping[str, Placement], mesh: Mesh) -> bool:
    """Return whether the ranks of each stage hold parts of the same tensors, with moments; the same on all ranks."""
    if mesh.layout.pp_size > 1:
        return not mesh.host.any(not (have_same_tensors(placements, mesh.stage) and has_moments(placements)))
    if have_same_tensors(placements, mesh.host):
        check_moments(placements)
        return True
    return False


def copy_groups(mesh: Mesh) -> Iterator[Group]:
    """Yield the groups of ranks that may hold the same parts of a state, each once, the largest first."""
    seen: set[tuple[int, ...]] = set()
    shards = mesh.shard_copies, mesh.edp_shard_copies, mesh.tdp_shard_copies
    for group in (mesh.stage, mesh.edp, mesh.tdp, *shards):
        if group.size > 1 and group.ranks not in seen:
            seen.add(group.ranks)
            yield group


def _plan_by_groups(placements: Mapping[str, Placement], mesh: Mesh) -> SavePlan:
    """Return the plan in which the largest group that holds a tensor's same part shares the writing of it."""
    names, me = list(placements), mesh.layout.rank
    where = torch.tensor([stable_hash(str(place.spans)) for place in placements.values()])  # (N,)
    mine: list[tuple[int, int, int]] = []  # number of the tensor, start, length
    is_left = torch.ones(len(names), dtype=torch.bool)
    for group in (*copy_groups(mesh), Group.of_one()):
        is_shared = is_left & ~group.differs(where.to(group.device)).cpu()
        is_left &= ~is_shared
        mine += _share(placements, is_shared, group)
    of_stages, elsewhere = _stages(placements, mesh)
    mine = sorted(part for part in mine if names[part[0]] not in elsewhere)
    everyone = mesh.host.gather_objects(mine)
    by_rank = {me: mine} if everyone is None else dict(enumerate(everyone))
    places = dict(placements) if everyone is None else {n: p for held in reversed(of_stages) for n, p in held.items()}
    parts: dict[str, list[StatePart]] = {name: [] for name in places if name not in elsewhere}
    names_of = [list(held) for held in of_stages]
    for rank, of_rank in by_rank.items():
        of_stage = names if rank == me else names_of[rank // mesh.layout.stage_size]
        for number, start, length in of_rank:
            parts[of_stage[number]].append(StatePart(rank, start, length))
    return SavePlan(places=places, parts={name: sorted(ps, key=lambda p: p[1:]) for name, ps in parts.items()})


def _stages(placements: Mapping[str, Placement], mesh: Mesh) -> tuple[list[Mapping[str, Placement]], set[str]]:
    """Return what each stage holds, on rank 0, and what this rank leaves to an earlier stage, such as a tied embedding.

    One rank of each stage sends its placements: all ranks of a stage have the same tensors.
    """
    layout = mesh.layout
    if layout.pp_size == 1:
        return [placements], set()
    gathered = mesh.pp.gather_objects(placements) if layout.is_first_of_stage else None
    of_stages = [{name: Placement(*values) for name, values in held.items()} for held in gathered or []]
    first: dict[str, int] = {}
    shared: dict[str, int] = {}  # stage that writes it
    for stage, held in enumerate(of_stages):
        shared |= {name: first[name] for name in held if name in first}
        first = {name: stage for name in held} | first
    writers = mesh.host.broadcast_object(shared)
    return list(of_stages), {name for name, stage in writers.items() if stage != layout.pp_rank}


def _share(placements: Mapping[str, Placement], is_shared: Tensor, group: Group) -> Iterator[tuple[int, int, int]]:
    """Yield the parts of shared tensors that this rank of those with copies writes: who has least to write does."""
    load = [0] * group.size
    for number, (place, chosen) in enumerate(zip(placements.values(), is_shared.tolist(), strict=True)):
        if not chosen or (place.length == 0 and 0 not in place.shape):
            continue
        for start, length in place.spans:
            writer = load.index(min(load))
            load[writer] += length * place.index_bytes
            if writer == group.index:
                yield number, start, length


def _covers(plan: SavePlan) -> bool:
    """Return whether the parts are all of every tensor, each index once."""
    for name, place in plan.places.items():
        parts = plan.parts[name]
        if not parts or partition_error([part[1:] for part in parts], place.shape[0] if place.shape else 1) is not None:
            return False
    return True
