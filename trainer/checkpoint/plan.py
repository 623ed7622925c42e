"""Plan which rank writes which part of a state: every part once, the work spread evenly."""

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
    """Place of one rank's part of a tensor, without its values."""

    start: int
    length: int
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    dtype: torch.dtype
    is_of_experts: bool

    @classmethod
    def of(cls, part: Slice) -> "Placement":
        """Describe a slice."""
        return cls(part.start, part.length, part.global_shape, part.tensor.dtype, part.is_of_experts)

    def to_plain(self) -> list[Any]:
        """Return it for another rank."""
        return [self.start, self.length, list(self.shape), str(self.dtype).removeprefix("torch."), self.is_of_experts]

    @classmethod
    def of_plain(cls, value: Sequence[Any]) -> "Placement":
        """Return the place that another rank has sent."""
        start, length, shape, dtype, is_of_experts = value
        return cls(start, length, tuple(shape), getattr(torch, dtype), is_of_experts)


@dataclass(frozen=True, slots=True)
class StatePart:
    """A part of a tensor, and who writes it."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """Assignment of the parts of a state to the ranks that write them."""

    places: dict[str, Placement]
    """Every tensor, as any of its holders describes it."""
    parts: dict[str, list[StatePart]]
    """Parts by name; in order, each index of dimension 0 once."""

    def of_rank(self, rank: int) -> list[str]:
        """Return the names of the tensors of which a rank writes its part."""
        return [name for name, parts in self.parts.items() if any(part.rank == rank for part in parts)]


def local_placements(state: TrainState) -> dict[str, Placement]:
    """Return what this rank holds."""
    return {name: Placement.of(part) for name, part in state.slices.items()}


def plan_save(held: Sequence[Mapping[str, Placement]]) -> SavePlan:
    """Give every part of every tensor to one of the ranks that hold it: the one with the least to write so far.

    Args:
        held: for each rank, what `describe` returned there.

    Raises:
        CheckpointError: if ranks disagree about a tensor, a part of one is on no rank, or experts lack their moments.
            All ranks come to the same conclusion.
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
        wrong = partition_error(holders, shape[0] if shape else 1)
        if wrong is not None:
            raise CheckpointError(f"{name}: not saved: {wrong}; this is a bug in the engine")
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
