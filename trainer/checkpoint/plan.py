"""Plan which rank writes which part of a state: every part once, with the bytes spread evenly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from trainer.checkpoint.coverage import missing_moments, partition_error, spans_of
from trainer.checkpoint.manifest import DTYPES, DType
from trainer.checkpoint.state import TrainState
from trainer.errors import CheckpointError


class Placement(NamedTuple):
    """Metadata of one rank's part of a tensor; JSON-serialisable."""

    start: int
    length: int
    shape: Sequence[int]
    dtype: DType
    is_of_experts: bool
    is_frozen: bool = False
    numbers: Sequence[int] | None = None
    """As in `Slice`."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Start and length of each run of consecutive indices."""
        if self.numbers is None:
            return [(self.start, self.length)]
        return [(start, length) for _, start, length in spans_of(self.numbers)]

    @property
    def index_bytes(self) -> int:
        """Bytes of one index of dimension 0."""
        return prod(self.shape[1:]) * DTYPES[self.dtype][0]


class StatePart(NamedTuple):
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
    """Parts of each tensor, in order; those of all ranks cover each index of dimension 0 once."""

    def of_rank(self, rank: int) -> list[tuple[str, StatePart]]:
        """Return the parts that a rank writes, with the names of their tensors."""
        return [(name, part) for name, parts in self.parts.items() for part in parts if part.rank == rank]

    def sizes_by_rank(self) -> dict[int, dict[tuple[str, int], int]]:
        """Return the bytes of each part that each rank writes, by tensor and start, in the order of `of_rank`."""
        sizes: dict[int, dict[tuple[str, int], int]] = {}
        for name, parts in self.parts.items():
            for part in parts:
                sizes.setdefault(part.rank, {})[name, part.start] = part.length * self.places[name].index_bytes
        return sizes

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum((place.shape[0] if place.shape else 1) * place.index_bytes for place in self.places.values())


def local_placements(state: TrainState) -> dict[str, Placement]:
    """Return the placements of this rank's slices."""
    placements = {}
    for name, part in state.slices.items():
        dtype: Any = str(part.tensor.dtype).removeprefix("torch.")
        marks = part.is_of_experts, part.is_frozen
        placements[name] = Placement(part.start, part.length, part.global_shape, dtype, *marks, part.numbers)
    return placements


def plan_save(held: Sequence[Mapping[str, Placement]]) -> SavePlan:
    """Assign every part of every tensor to one of its holders: the one with the fewest bytes to write so far.

    `held` has the `local_placements` of each rank. The plan and its errors are the same on all ranks.

    Raises:
        CheckpointError: if ranks disagree about a tensor, part of one is on no rank, or experts lack their moments.
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
                for span in place.spans:
                    holders.setdefault(span, []).append(rank)
        shape = places[name].shape
        error = partition_error(holders, shape[0] if shape else 1)
        if error is not None:
            raise CheckpointError(f"{name}: not saved: {error}; this is a bug in the engine")
        parts[name] = []
        for (start, length), ranks in sorted(holders.items()):
            writer = min(ranks, key=lambda rank: (load[rank], rank))
            load[writer] += length * places[name].index_bytes
            parts[name].append(StatePart(writer, start, length))
    check_moments(places)
    return SavePlan(places=places, parts=parts)


def has_moments(places: Mapping[str, Placement]) -> bool:
    """Return whether all experts that learn have their moments."""
    return not _missing_moments(places)


def check_moments(places: Mapping[str, Placement]) -> None:
    """Raise a CheckpointError if experts that learn lack their moments."""
    for missing in _missing_moments(places):
        raise CheckpointError(f"not saved: {missing}; this is a bug in the engine")


def _missing_moments(places: Mapping[str, Placement]) -> list[str]:
    experts = [name for name, place in places.items() if place.is_of_experts and not place.is_frozen]
    return list(missing_moments({name: place.shape for name, place in places.items()}, experts))
