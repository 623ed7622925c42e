"""Compare replicated tensors across ranks, to detect and locate a flipped bit.

Parts of a tensor that several ranks hold must be bitwise equal: dense weights, moments and buffers on all ranks,
experts within each edp group, cuts of matrices within each tdp group, shards on the ranks that `parallel.shard_size`
gives copies of them. Tensors sharded over all ranks have no replica, so they cannot be checked.

# W ranks, N tensors of a state.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainer.checkpoint.plan_together import copy_groups
from trainer.checkpoint.state import TrainState
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import format_ranks
from trainer.errors import DivergedError, NumericsError

_SHOWN = 3  # most tensors named in a message
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_copies(state: TrainState, mesh: Mesh, *, step: int, equal_at: int | None) -> None:
    """Compare checksums of replicated tensors across the ranks with copies of them; collective.

    All ranks have the same names in the same order. `step` counts completed steps; `equal_at` is that at which the
    copies were last found equal, None if they never were compared.

    Raises:
        NumericsError: if copies differ at the first comparison; on every rank, with the same message.
        DivergedError: if copies differ that were equal before; on every rank, with the same message.
    """
    if mesh.world.size == 1:
        return
    mesh.world.recorder.enter("comparing copies")
    mine = _fingerprints(state).to(mesh.world.device)  # (N, 3)
    if not mesh.world.any(any([_differ(mine, group) for group in copy_groups(mesh)])):  # each group is asked
        return
    table = mesh.stage.all_gather(mine).cpu()  # (W, N, 3)
    said = _difference(table, list(state.slices), mesh, step=step, equal_at=equal_at)
    message = next((found for found in mesh.world.all_gather_objects(said) if found is not None), None)
    if message is not None:
        raise (NumericsError if equal_at is None else DivergedError)(message)


def _difference(table: Tensor, names: Sequence[str], mesh: Mesh, *, step: int, equal_at: int | None) -> str | None:
    """Return which copies differ, given the fingerprints (W, N, 3) of the ranks with the same layers; None: none do."""
    suspect = torch.zeros(table.shape[:2], dtype=torch.bool)  # (W, N)
    ep, tp = mesh.layout.ep_size, mesh.layout.tp_size
    for period in (1, ep, tp, mesh.shard.size, ep * mesh.edp_shard.size, tp * mesh.tdp_shard.size):
        first_copy = torch.arange(len(table)) % period  # the first rank with the same weights, experts, cut or shards
        suspect |= _differs(table, table[first_copy])
    if not suspect.any():
        return None
    columns = {names[int(i)]: table[:, i] for i in suspect.any(0).nonzero()[:, 0]}
    return _message(columns, step, equal_at, first_rank=mesh.stage.ranks[0])


def checksum(tensor: Tensor) -> Tensor:
    """Return an int64 scalar on the tensor's device: a weighted sum of its bits, which any single flipped bit changes.

    Each index of dimension 0 has an odd weight of its own, so that permuted experts do not have the same sum. Sums wrap
    around at 2^64; a flipped bit changes them by an odd multiple of a smaller power of two, so never by 0.
    """
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    rows = tensor.detach().contiguous().view(len(tensor) if tensor.dim() else 1, -1)
    # Summing 8-byte words is 30 times as fast as summing smaller ones, which torch converts first.
    if rows.shape[1] * rows.element_size() % 8 == 0:
        is_aligned = rows.storage_offset() * rows.element_size() % 8 == 0
        sums = (rows if is_aligned else rows.clone()).view(torch.int64).sum(1)
    else:
        sums = rows.view(_WORDS[rows.element_size()]).sum(1, dtype=torch.int64)
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


def _fingerprints(state: TrainState) -> Tensor:
    """Return (N, 3) int64: start, length and checksum of this rank's part of each tensor."""
    parts = list(state.slices.values())
    device = parts[0].tensor.device  # offloaded moments may be on another one
    place = [[part.start, part.tensor.shape[0] if part.tensor.dim() else 1] for part in parts]
    sums = torch.stack([checksum(part.tensor).to(device) for part in parts])
    return torch.cat([torch.tensor(place, device=device), sums[:, None]], dim=1)


def _differ(fingerprints: Tensor, group: Group) -> bool:
    """Return whether copies differ among ranks that all hold the same part of a tensor; collective."""
    differs = group.differs(fingerprints)  # (N, 3)
    return bool((differs[:, 2] & ~differs[:, :2].any(1)).any())


def _differs(table: Tensor, other: Tensor) -> Tensor:
    """Return (W, N) bool: the part of the tensor is the same as in `other`, but its checksum differs."""
    return (table[..., :2] == other[..., :2]).all(-1) & (table[..., 2] != other[..., 2])


def _message(columns: dict[str, Tensor], step: int, equal_at: int | None, *, first_rank: int) -> str:
    """Describe which tensors differ, and on which ranks; `columns` has their (W, 3) fingerprints."""
    names_of: dict[tuple[tuple[int, ...], ...], list[str]] = defaultdict(list)
    for name, column in columns.items():
        for sides in _sides(column.tolist(), first_rank):
            names_of[sides].append(name.removeprefix("model."))
    said = "; ".join(_sentence(sides, names) for sides, names in names_of.items())
    wrong = sorted({rank for sides in names_of for side in _wrong(sides) or sides for rank in side})
    if equal_at is None:
        advice = "all ranks must start from the same values: use one torch and one config everywhere"
        return f"step {step}: {said}; {advice}"
    return (
        f"step {step}: {said}; all copies were equal at step {equal_at}. Nothing has been saved since: start the "
        "run again; it continues from the last checkpoint; if it happens again, suspect the memory of the host of "
        f"{format_ranks(wrong)}"
    )


def _sides(column: Sequence[Sequence[int]], first_rank: int) -> Iterable[tuple[tuple[int, ...], ...]]:
    """Yield, for each part of a tensor whose copies differ, the groups of ranks that agree, largest first."""
    parts: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, (start, length, total) in enumerate(column, start=first_rank):
        parts[start, length][total].append(rank)
    for holders in parts.values():
        if len(holders) > 1:
            yield tuple(sorted(map(tuple, holders.values()), key=len, reverse=True))


def _wrong(sides: Sequence[Sequence[int]]) -> Sequence[Sequence[int]] | None:
    """Return the groups outside the majority; None if there is no majority."""
    return sides[1:] if len(sides[0]) > sum(map(len, sides[1:])) else None


def _sentence(sides: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    what = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more tensors" if len(names) > _SHOWN else "")
    wrong = _wrong(sides)
    if wrong is None:
        ranks = format_ranks(sorted(rank for side in sides for rank in side))
        return f"{ranks} hold different copies of {what}, and which of them is wrong cannot be told"
    ranks = sorted(rank for side in wrong for rank in side)
    return f"{format_ranks(ranks)} hold{'s' * (len(ranks) == 1)} another copy of {what} than {format_ranks(sides[0])}"
