"""Times of the same work in interleaved rounds. Imports no torch."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLLECTIVES = ("all_reduce", "all_to_all", "all_gather", "reduce_scatter")


_CERTAIN = 1.1
"""Best round of what is slow over the usual time: a disturbance of some rounds names nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Seconds of the same work in interleaved rounds, so that a disturbance of the machine is in one of each."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """The usual time."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The shortest time."""
        return min(self.seconds)

    def times_slower(self, usual: float, factor: float) -> float | None:
        """Return its time over the usual one; None unless that is the factor or more, and its best round slow too."""
        is_slow = self.median >= factor * usual and self.best >= _CERTAIN * usual
        return self.median / usual if is_slow else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSpeed:
    """A collective of all ranks."""

    num_bytes: int
    """Bytes of the tensor that each rank passes, its own part included; of a gather what it gets."""
    rounds: Rounds
    """Time of the slowest rank."""

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"bytes": self.num_bytes, "seconds": self.rounds.median}


Times = Mapping[tuple[str, ...], Sequence[Sequence[float]]]
"""Seconds of every rank and round, by the name of the work."""


def slowest(of_ranks: Sequence[Sequence[float]]) -> Rounds:
    """Return the time of the slowest rank in each round."""
    return Rounds(seconds=[max(one) for one in zip(*of_ranks, strict=True)])


def curve_of(times: Times, kind: str) -> list[CollectiveSpeed]:
    """Return the times of a collective by its bytes."""
    found = {int(name[1]): of_ranks for name, of_ranks in times.items() if name[0] == kind}
    return [CollectiveSpeed(num_bytes=size, rounds=slowest(found[size])) for size in sorted(found)]
