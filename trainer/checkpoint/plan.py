"""Plan which rank writes which part of a state: every part once, with the bytes spread evenly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from trainer.checkpoint.coverage import missing_moments, partition_error
from trainer.checkpoint.state import Slice, TrainState
from trainer.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Placement:
    """Metadata of one rank's part of a tensor."""

    start: int
    length: int
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    dtype: torch.dtype
    is_of_experts: bool

    @classmethod
    def of(cls, part: Slice) -> "Placement":
        """Return the placement of a slice."""
        return cls(part.start, part.length, part.global_shape, part.tensor.dtype, part.is_of_experts)

    def to_plain(self) -> list[Any]:
        """Return JSON values for another rank."""
        return [self.start, self.length, list(self.shape), str(self.dtype).removeprefix("torch."), self.is_of_experts]

    @classmethod
    def of_plain(cls, value: Sequence[Any]) -> "Placement":
        """Return the placement that another rank sent."""
        start, length, shape, dtype, is_of_experts = value
        return cls(start, length, tuple(shape), getattr(torch, dtype), is_of_experts)


@dataclass(frozen=True, slots=True)
class StatePart:
    """A part of a tensor and the rank that writes it."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """Assignment of the parts of a state to the ranks that write them."""

    places: dict[str, Placement]
    """Placement of each tensor on any one of its holders."""
    parts: dict[str, list[StatePart]]
    """Parts of each tensor, in order; they cover each index of dimension 0 once."""

    def of_rank(self, rank: int) -> list[str]:
        """Return the names of the tensors that a rank writes a part of."""
        return [name for name, parts in self.parts.items() if any(part.rank == rank for part in parts)]


def local_placements(state: TrainState) -> dict[str, Placement]:
    """Return the placements of this rank's slices."""
    return {name: Placement.of(part) for name, part in state.slices.items()}


def plan_save(held: Sequence[Mapping[str, Placement]]) -> SavePlan:
    """Assign every part of every tensor to one of its holders: the one with the fewest bytes to write so far.

    Args:
        held: `local_placements` of each rank.

    Raises:
        CheckpointError: if ranks disagree about a tensor, part of one is on no rank, or experts lack their moments. The
            plan and its errors are the same on all ranks.
    """
    places: dict[str, Placement] = {}
    parts: dict[str, list[StatePart]] = {}
    load = [0] * len(held)
    for name in dict.fromkeys(name for mine in held for name in mine):
        holders: dict[tuple[int, int], list[int]] = {}
        for rank, mine in enumerate(held):
            if name not in mine:
                continue
            place = mine[name]
            first = places.setdefault(name, place)
            if (place.shape, place.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{name}: ranks disagree: {list(first.shape)} {first.dtype} and {list(place.shape)} {place.dtype}; "
                    "this is a bug in the engine"
                )
            if place.length > 0 or 0 in place.shape:
                holders.setdefault((place.start, place.length), []).append(rank)
        shape = places[name].shape
        error = partition_error(holders, shape[0] if shape else 1)
        if error is not None:
            raise CheckpointError(f"{name}: not saved: {error}; this is a bug in the engine")
        parts[name] = []
        for (start, length), ranks in sorted(holders.items()):
            writer = min(ranks, key=lambda rank: (load[rank], rank))
            load[writer] += length * prod(shape[1:]) * places[name].dtype.itemsize
            parts[name].append(StatePart(writer, start, length))
    experts = [name for name, place in places.items() if place.is_of_experts]
    missing = next(missing_moments({name: place.shape for name, place in places.items()}, experts), None)
    if missing is not None:
        raise CheckpointError(f"not saved: {missing}; this is a bug in the engine")
    return SavePlan(places=places, parts=parts)
