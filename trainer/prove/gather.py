"""Gather a sharded state on rank 0."""

import torch

from trainer.checkpoint.state import Slice, TrainState
from trainer.distributed.mesh import Mesh
from trainer.errors import CheckpointError


def gather_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Return the whole state on rank 0, and the local state on other ranks. Collective.

    Of several ranks with the same slice, the first one sends it.

    Raises:
        CheckpointError: if slices overlap or are missing; on every rank.
    """
    if mesh.world.size == 1:
        return state
    mine = {name: _described(part) for name, part in state.slices.items()}
    parts = mesh.world.all_gather_objects(mine)
    slices, rank = dict(state.slices), mesh.layout.rank
    for name in dict.fromkeys(name for of_rank in parts for name in of_rank):  # ranks may hold other layers
        shape, dtype = next(of_rank[name][1:] for of_rank in parts if name in of_rank)
        total = shape[0] if shape else 1
        ranges = [
            [(start, length) for start, length in of_rank[name][0]] if name in of_rank else [] for of_rank in parts
        ]
        senders, end = {ranges.index(one) for one in ranges if any(length for _, length in one)}, 0
        for start, length in [*sorted(span for sender in senders for span in ranges[sender]), (total, 0)]:
            if start != end:
                raise CheckpointError(
                    f"{name}: no rank has the slice that starts at index {end} of {total}; ranks have {ranges}"
                )
            end += length
        if senders <= {0}:
            continue
        whole = torch.zeros(shape, dtype=getattr(torch, dtype), device=mesh.world.device)
        if rank in senders:
            for first, start, length in slices[name].spans:
                whole[start : start + length] = slices[name].tensor[first : first + length]
        mesh.world.all_reduce_(whole)
        if rank == 0:
            slices[name] = Slice.whole(whole)
    return TrainState(slices=slices, values=state.values)


def _described(part: Slice) -> tuple[list[tuple[int, int]], list[int], str]:
    """Return where the slice is, and shape and dtype of the whole tensor."""
    return [span[1:] for span in part.spans], list(part.global_shape), str(part.tensor.dtype).removeprefix("torch.")
