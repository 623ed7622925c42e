"""Place experts on ranks: consecutive ones as in training, or so that loads are even.

# L MoE layers, E experts, G ranks.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from trainer.config.nodes import shown_path
from trainer.distributed.rank_layout import even_slices
from trainer.errors import ConfigError


def contiguous_placement(num_layers: int, num_experts: int, num_ranks: int) -> Tensor:
    """Return (L, E) the rank of each expert under `parallel.ep_size`: an even share of consecutive ones."""
    owners = [rank for rank, (first, end) in enumerate(even_slices(num_experts, num_ranks)) for _ in range(first, end)]
    return torch.tensor(owners).repeat(num_layers, 1)


def balanced_placement(loads: Tensor, num_ranks: int) -> Tensor:
    """Return (L, E) ranks by the loads (L, E): as many experts on each as when contiguous, and even sums.

    Largest first to the least loaded rank that has room, then exchanges of two experts as long as one makes the busiest
    rank less busy.
    """
    placed = []
    for layer in loads.tolist():
        room = [end - first for first, end in even_slices(len(layer), num_ranks)]
        owner, busy = [0] * len(layer), [0] * num_ranks
        for expert in sorted(range(len(layer)), key=lambda e: (-layer[e], e)):
            rank = min((r for r in range(num_ranks) if room[r]), key=lambda r: (busy[r], r))
            owner[expert], busy[rank], room[rank] = rank, busy[rank] + layer[expert], room[rank] - 1
        while _exchange(layer, owner, busy):
            pass
        placed.append(owner)
    return torch.tensor(placed)


def _exchange(loads: list[int], owner: list[int], busy: list[int]) -> bool:
    """Exchange an expert of the busiest rank with a lighter one of another, if that lowers both; say if one was."""
    top = max(range(len(busy)), key=lambda r: (busy[r], -r))
    best = None
    for ours in (e for e, rank in enumerate(owner) if rank == top):
        for theirs, rank in enumerate(owner):
            gain = loads[ours] - loads[theirs]
            if rank == top or gain <= 0:
                continue
            highest = max(busy[top] - gain, busy[rank] + gain)
            if highest < busy[top] and (best is None or highest < best[0]):
                best = (highest, ours, theirs)
    if best is None:
        return False
    _, ours, theirs = best
    gain = loads[ours] - loads[theirs]
    busy[top] -= gain
    busy[owner[theirs]] += gain
    owner[ours], owner[theirs] = owner[theirs], owner[ours]
    return True


def read_placement(path: Path, num_layers: int, num_experts: int) -> Tensor:
    """Return (L, E) the rank of each expert from a JSON file: a list for each MoE layer.

    Raises:
        ConfigError: if it has another form.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--placement: {shown_path(path)}: cannot be read as JSON ({error})") from None
    is_right = (
        isinstance(values, list)
        and len(values) == num_layers
        and all(isinstance(layer, list) and len(layer) == num_experts for layer in values)
        and all(type(rank) is int and 0 <= rank < 1 << 16 for layer in values for rank in layer)
    )
    if not is_right:
        raise ConfigError(
            f"--placement: {shown_path(path)}: is no list of {num_layers} lists, one for each MoE layer, with the rank "
            f"of each of {num_experts} experts"
        )
    return torch.tensor(values)
