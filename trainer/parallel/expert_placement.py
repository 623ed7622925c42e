"""Which rank has which experts, in each MoE layer: `parallel.placement`, its files, and the programme's. No torch.

    contiguous     0 0 1 1 2 2       round_robin     0 1 2 0 1 2       a file, for a layer     2 0 0 1 1 2

# L MoE layers, E experts, G ranks of an expert-parallel group.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.atomic_io import replace_file
from trainer.config.nodes import shown_path
from trainer.distributed.rank_layout import even_slices
from trainer.errors import ConfigError
from trainer.parallel.placement_programme import LayerPlacement, rank_loads

Owners = tuple[tuple[int, ...], ...]
"""(L, E) rank of each expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlacement:
    """Ranks of all experts."""

    num_ranks: int
    owners: Owners


def room_of(num_experts: int, num_ranks: int) -> list[int]:
    """Return (G,) the number of experts on each rank, whatever the placement: an even share."""
    return [end - first for first, end in even_slices(num_experts, num_ranks)]


def contiguous_placement(num_layers: int, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Return the placement of consecutive experts on each rank."""
    owner = tuple(rank for rank, room in enumerate(room_of(num_experts, num_ranks)) for _ in range(room))
    return ExpertPlacement(num_ranks=num_ranks, owners=(owner,) * num_layers)


def round_robin_placement(num_layers: int, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Return the placement of neighbouring experts on different ranks, in turn while they have room."""
    room = room_of(num_experts, num_ranks)
    turns = [rank for turn in range(max(room)) for rank in range(num_ranks) if turn < room[rank]]
    return ExpertPlacement(num_ranks=num_ranks, owners=(tuple(turns),) * num_layers)


def named_placement(name: str, num_layers: int, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Return the placement that a value of `parallel.placement` names; `auto` without loads is contiguous.

    Raises:
        ConfigError: if it is a file that cannot be read, or is not for these layers, experts and ranks.
    """
    if name == "round_robin":
        return round_robin_placement(num_layers, num_experts, num_ranks)
    if name in ("contiguous", "auto"):
        return contiguous_placement(num_layers, num_experts, num_ranks)
    key = "parallel.placement"
    found = read_placement(Path(name), num_layers=num_layers, num_experts=num_experts, key=key)
    if found.num_ranks != num_ranks:
        raise ConfigError(
            f"{key}: {shown_path(name)} is for {found.num_ranks} ranks (its ep_size), and parallel.ep_size is "
            f"{num_ranks}; make one for {num_ranks}: turnout what-if TRACE --ep-size {num_ranks} --write-placement FILE"
        )
    return found


def placement_by_loads(
    loads: Sequence[Sequence[int]],
    num_ranks: int,
    place: Callable[[Sequence[int], Sequence[int]], LayerPlacement],
) -> tuple[ExpertPlacement, list[LayerPlacement]]:
    """Return the placement by the loads (L, E) of experts, and what is known of each layer's.

    `place` is `solve_placement` or `greedy_placement`.
    """
    layers = [place(layer, room_of(len(layer), num_ranks)) for layer in loads]
    owners = tuple(tuple(layer.owner) for layer in layers)
    return ExpertPlacement(num_ranks=num_ranks, owners=owners), layers


def busiest_over_mean(loads: Sequence[Sequence[int]], placement: ExpertPlacement) -> list[float]:
    """Return (L,) the rows of the busiest rank over the mean of ranks; 1 where there are none."""
    found = []
    for layer, owner in zip(loads, placement.owners, strict=True):
        total = sum(layer)
        found.append(max(rank_loads(layer, owner, placement.num_ranks)) * placement.num_ranks / total if total else 1.0)
    return found


def write_placement(path: Path, placement: ExpertPlacement) -> None:
    """Write a placement to a JSON file, a line for each MoE layer."""
    layers = ",\n  ".join(json.dumps(list(owner)) for owner in placement.owners)
    replace_file(path, f'{{"ep_size": {placement.num_ranks},\n "ranks": [\n  {layers}\n ]}}\n')


def read_placement(path: Path, *, num_layers: int, num_experts: int, key: str) -> ExpertPlacement:
    """Return the placement in a JSON file.

    Raises:
        ConfigError: if it has another form; `key` is who named the file.
    """
    where = f"{key}: {shown_path(path)}"
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read as JSON ({error})") from None
    size, ranks = (values.get("ep_size"), values.get("ranks")) if isinstance(values, dict) else (None, None)
    is_right = (
        type(size) is int
        and 0 < size <= num_experts
        and isinstance(ranks, list)
        and len(ranks) == num_layers
        and all(isinstance(layer, list) and len(layer) == num_experts for layer in ranks)
        and all(type(rank) is int and 0 <= rank < size for layer in ranks for rank in layer)
    )
    if not is_right:
        raise ConfigError(
            f"{where}: needs ep_size, at most {num_experts}, and ranks, a list of {num_layers} lists, one for each MoE "
            f"layer, with the rank of each of {num_experts} experts, below ep_size; turnout what-if TRACE --ep-size N "
            "--write-placement FILE makes one"
        )
    placement = ExpertPlacement(num_ranks=size, owners=tuple(tuple(layer) for layer in ranks))
    room = room_of(num_experts, size)
    for layer, owner in enumerate(placement.owners):
        found = [owner.count(rank) for rank in range(size)]
        if found != room:
            raise ConfigError(
                f"{where}: MoE layer {layer + 1} of {num_layers} has {found} experts on the ranks; every rank has as "
                f"many as when they are contiguous: {room}"
            )
    return placement
