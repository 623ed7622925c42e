"""Gather a sharded state on rank 0."""

from trainer.checkpoint.state import Slice, TrainState
from trainer.distributed.mesh import Mesh
from trainer.errors import CheckpointError


def gather_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Return the whole state on rank 0, and the local state on other ranks. Collective.

    Of several ranks with the same slice, the first one sends it.

    Raises:
        CheckpointError: if slices overlap the end or are missing; on every rank.
    """
    if mesh.world.size == 1:
        return state
    parts = mesh.world.all_gather_objects({name: (part.start, part.length) for name, part in state.slices.items()})
    slices, rank = dict(state.slices), mesh.layout.rank
    for name, part in state.slices.items():
        total = part.global_shape[0] if part.global_shape else 1
        senders = _senders([(start, length) for start, length in (of_rank[name] for of_rank in parts)], total, name)
        if senders == [0]:
            continue
        whole = part.tensor.new_zeros(part.global_shape)
        if rank in senders:
            whole[part.start : part.start + part.length] = part.tensor
        mesh.world.all_reduce_(whole)
        if rank == 0:
            slices[name] = Slice.whole(whole)
    return TrainState(slices=slices, values=state.values)


def _senders(parts: list[tuple[int, int]], total: int, name: str) -> list[int]:
    """Return the ranks whose slices, in order, make up a whole tensor.

    #  parts of 4 ranks   (0, 2) (2, 3) (0, 2) (2, 3)     total 5     senders 0, 1
    """
    senders, end = [], 0
    while end < total:
        rank = next((r for r, (start, length) in enumerate(parts) if start == end and length > 0), None)
        if rank is None:
            raise CheckpointError(
                f"{name}: no rank has the slice that starts at index {end} of {total}; ranks have {parts}"
            )
        senders.append(rank)
        end += parts[rank][1]
    if end > total:
        raise CheckpointError(f"{name}: a slice extends beyond index {total}; ranks have {parts}")
    return senders
