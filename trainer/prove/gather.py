"""Gather a sharded state on rank 0."""

import torch

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
    # Per rank and name: start and length along dimension 0.
    local = {name: (part.start, len(part.tensor) if part.tensor.dim() else 1) for name, part in state.slices.items()}
    rows = mesh.world.all_gather_objects(local)
    table: list[dict[str, tuple[int, int]]] = [{name: (at, size) for name, (at, size) in row.items()} for row in rows]
    slices = {}
    for name, part in state.slices.items():
        total = part.global_shape[0] if part.global_shape else 1
        senders = _senders([row[name] for row in table], total, name)
        if senders == [0]:
            slices[name] = part
            continue
        rank, is_first = mesh.layout.rank, mesh.layout.rank == 0
        send = [0] * mesh.world.size
        send[0] = len(part.tensor) if rank in senders else 0
        receive = [table[r][name][1] if is_first and r in senders else 0 for r in range(mesh.world.size)]
        received = mesh.world.all_to_all(part.tensor[: send[0]], send, receive)
        if not is_first:
            slices[name] = part
            continue
        whole = torch.empty(part.global_shape, dtype=received.dtype)  # on the CPU: it may not fit on a GPU
        for row, piece in zip(table, received.split(receive), strict=True):
            start = row[name][0]
            whole[start : start + len(piece)] = piece
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
