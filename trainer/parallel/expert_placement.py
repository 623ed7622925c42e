"""Which rank has which experts, in each MoE layer: `parallel.placement`, its files, and the programme's. No torch.

    contiguous     0 0 1 1 2 2       round_robin     0 1 2 0 1 2       a file, for a layer     2 0 0 1 1 2

# L MoE layers, E experts, G ranks of an expert-parallel group.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from trainer.atomic_io import replace_file
from trainer.config.nodes import shown_path
from trainer.distributed.rank_layout import even_slices
from trainer.errors import ConfigError
from trainer.parallel.copy_experts import Place, copies_of_neighbours, place_with_copies
from trainer.parallel.placement_programme import LayerPlacement

PLACED_BY_NUMBERS = ("contiguous", "round_robin", "auto")
"""Values of `parallel.placement` that need neither loads nor a file."""
Copies = tuple[tuple[tuple[int, ...], ...], ...]
"""(L, G, n) experts of other ranks that each rank has copies of."""
Owners = tuple[tuple[int, ...], ...]
"""(L, E) rank of each expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlacement:
    """Ranks of all experts."""

    num_ranks: int
    owners: Owners
    copies: Copies = ()
    """In each layer as many on each rank; empty: none."""

    @property
    def num_copies(self) -> int:
        """Number of copies on each rank."""
        return len(self.copies[0][0]) if self.copies else 0

    def held(self, layer: int, rank: int) -> tuple[list[int], list[int]]:
        """Return a rank's own experts of a layer, by number, and those that it has copies of, by owner and number."""
        owner = self.owners[layer]
        copies = self.copies[layer][rank] if self.copies else ()
        return [e for e, r in enumerate(owner) if r == rank], sorted(copies, key=lambda e: (owner[e], e))

    def places(self, layer: int) -> list[list[int]]:
        """Return the places (E, ...) of each expert of a layer in the order of ranks, its own rank's first."""
        own: list[list[int]] = [[] for _ in self.owners[layer]]
        further: list[list[int]] = [[] for _ in own]
        place = 0
        for rank in range(self.num_ranks):
            for experts, found in zip(self.held(layer, rank), (own, further), strict=True):
                for expert in experts:
                    found[expert].append(place)
                    place += 1
        return [[*mine, *others] for mine, others in zip(own, further, strict=True)]


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


def with_neighbours(placement: ExpertPlacement, num_copies: int) -> ExpertPlacement:
    """Return the placement with copies on each rank of the first experts of the ranks after it: without any loads."""
    found = [copies_of_neighbours(owner, placement.num_ranks, num_copies) for owner in placement.owners]
    return replace(placement, copies=tuple(tuple(map(tuple, held)) for held in found)) if num_copies else placement


def named_placement(
    name: str, num_layers: int, num_experts: int, num_ranks: int, *, num_copies: int = 0
) -> ExpertPlacement:
    """Return what `parallel.placement` and `parallel.replicas` ask for; `auto` without loads is contiguous.

    Raises:
        ConfigError: if it is a file that cannot be read, or is not for these layers, experts, ranks and copies.
    """
    if name in PLACED_BY_NUMBERS:
        by_numbers = round_robin_placement if name == "round_robin" else contiguous_placement
        return with_neighbours(by_numbers(num_layers, num_experts, num_ranks), num_copies)
    key = "parallel.placement"
    found = read_placement(Path(name), num_layers=num_layers, num_experts=num_experts, key=key)
    if (found.num_ranks, found.num_copies) != (num_ranks, num_copies):
        raise ConfigError(
            f"{key}: {shown_path(name)} is for {found.num_ranks} ranks (ep_size) with {found.num_copies} copies each, "
            f"and parallel.ep_size is {num_ranks} and parallel.replicas {num_copies}; make one for these: turnout "
            f"what-if TRACE --ep-size {num_ranks} --replicas {num_copies} --write-placement FILE"
        )
    return found


def placement_by_loads(
    loads: Sequence[Sequence[int]], num_ranks: int, place: Place, *, num_copies: int = 0
) -> tuple[ExpertPlacement, list[LayerPlacement]]:
    """Return the placement by the loads (L, E) of experts, and what is known of each layer's."""
    layers = [place_with_copies(layer, room_of(len(layer), num_ranks), num_copies, place) for layer in loads]
    owners = tuple(tuple(layer.owner) for layer in layers)
    copies = tuple(tuple(map(tuple, layer.copies)) for layer in layers) if num_copies else ()
    return ExpertPlacement(num_ranks=num_ranks, owners=owners, copies=copies), layers


def busiest_over_mean(loads: Sequence[Sequence[int]], placement: ExpertPlacement) -> list[float]:
    """Return (L,) the rows of the busiest rank over the mean of ranks; 1 where there are none.

    Those of an expert are in equal parts on all ranks that have it.
    """
    found = []
    for layer, of_expert in enumerate(loads):
        busy, places = [0.0] * placement.num_ranks, placement.places(layer)
        for rank in range(placement.num_ranks):
            busy[rank] = sum(of_expert[e] / len(places[e]) for held in placement.held(layer, rank) for e in held)
        total = sum(of_expert)
        found.append(max(busy) * placement.num_ranks / total if total else 1.0)
    return found


def write_placement(path: Path, placement: ExpertPlacement) -> None:
    """Write a placement to a JSON file, a line for each MoE layer."""
    lists = {"ranks": placement.owners, "copies": placement.copies}
    lines = [
        f' "{key}": [\n  ' + ",\n  ".join(json.dumps(layer) for layer in layers) + "\n ]"
        for key, layers in lists.items()
        if layers
    ]
    replace_file(path, "{" + ",\n".join([f'"ep_size": {placement.num_ranks}', *lines]) + "}\n")


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
    if type(size) is not int or not 0 < size <= num_experts or not _is_table(ranks, num_layers, num_experts, size):
        raise ConfigError(
            f"{where}: needs ep_size, at most {num_experts}, and ranks, a list of {num_layers} lists, one for each MoE "
            f"layer, with the rank of each of {num_experts} experts, below ep_size; turnout what-if TRACE --ep-size N "
            "--write-placement FILE makes one"
        )
    placement = ExpertPlacement(num_ranks=size, owners=tuple(map(tuple, ranks)))
    room = room_of(num_experts, size)
    for layer, owner in enumerate(placement.owners):
        found = [owner.count(rank) for rank in range(size)]
        if found != room:
            raise ConfigError(
                f"{where}: MoE layer {layer + 1} of {num_layers} has {found} experts on the ranks; every rank has as "
                f"many as when they are contiguous: {room}"
            )
    copies = values.get("copies", [])
    if not copies:
        return placement
    if not _are_copies(copies, placement, num_experts):
        raise ConfigError(
            f"{where}: copies needs {num_layers} lists, one for each MoE layer, of {size} lists, one for each rank, "
            "all of the same length, with different experts that other ranks have"
        )
    return replace(placement, copies=tuple(tuple(map(tuple, layer)) for layer in copies))


def _is_table(values: object, rows: int, columns: int, end: int) -> TypeGuard[list[list[int]]]:
    """Return whether JSON values are `rows` lists of `columns` whole numbers from 0 to end - 1."""
    return (
        isinstance(values, list)
        and len(values) == rows
        and all(isinstance(row, list) and len(row) == columns for row in values)
        and all(type(value) is int and 0 <= value < end for row in values for value in row)
    )


def _are_copies(values: object, placement: ExpertPlacement, num_experts: int) -> bool:
    size, layers = placement.num_ranks, len(placement.owners)
    if not isinstance(values, list) or len(values) != layers or not all(isinstance(of, list) and of for of in values):
        return False
    if not isinstance(values[0][0], list) or not values[0][0]:
        return False
    number = len(values[0][0])
    return all(
        _is_table(of_layer, size, number, num_experts)
        and all(len({*held}) == number and all(owner[e] != rank for e in held) for rank, held in enumerate(of_layer))
        for of_layer, owner in zip(values, placement.owners, strict=True)
    )
