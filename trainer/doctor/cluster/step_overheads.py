"""Time that a step takes beyond its products and what its collectives take on idle ranks. Imports no torch.

beside       collectives of ranks that compute between two of them: they arrive at different moments, and what sends
needs a processor too
operation    host time of one operation: from steps of a deep and a shallow tiny model
shard call   host time of FSDP2 around a gather or a reduction of a group of weights: from the same, sharded
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.doctor.cluster.timed_rounds import CollectiveSpeed, Rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySpeed:
    """Steps of a tiny model."""

    operations: int
    gathers: int
    reductions: int
    """Collectives of groups of sharded weights, as `gathers` are."""
    rounds: Rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOverheads:
    """Measured times of tiny steps, and of collectives between computations."""

    whole: tuple[TinySpeed, TinySpeed]
    """A shallow and a deep model."""
    sharded: tuple[TinySpeed, TinySpeed] | None = None
    """The same with sharded weights; None: there is one rank."""
    beside: Mapping[str, Sequence[CollectiveSpeed]] = field(default_factory=dict)

    @property
    def operation_s(self) -> float:
        """Host seconds of an operation; the deep model's collectives are as many as the shallow one's."""
        shallow, deep = self.whole
        return max(0.0, deep.rounds.median - shallow.rounds.median) / (deep.operations - shallow.operations)

    @property
    def shard_call_s(self) -> float:
        """Host seconds around a gather or a reduction of shards, beyond its operations and the smallest collective."""
        if self.sharded is None:
            return 0.0
        shallow, deep = self.sharded
        gathers, reductions = deep.gathers - shallow.gathers, deep.reductions - shallow.reductions
        seconds = deep.rounds.median - shallow.rounds.median
        seconds -= (deep.operations - shallow.operations) * self.operation_s
        for name, calls in (("all_gather", gathers), ("reduce_scatter", reductions)):
            seconds -= calls * self.beside[name][0].rounds.median
        return max(0.0, seconds) / (gathers + reductions)

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        curves = {name: [one.record() for one in curve] for name, curve in self.beside.items()}
        return {"beside_computation": curves, "operation_s": self.operation_s, "shard_call_s": self.shard_call_s}
