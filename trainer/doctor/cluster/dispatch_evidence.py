"""Times of dispatchers with the rows of a config, and which one is the fastest of those that are right. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.doctor.cluster.timed_rounds import Rounds

_SLOW = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherSpeed:
    """A dispatcher that could serve."""

    kind: str
    options: Mapping[str, Any]
    """Section of a config that chooses it."""
    rounds: Rounds | None = None
    """Times of the slowest rank: tokens there and back, forward and backward. None: it is wrong."""
    fault: str | None = None

    @property
    def yaml(self) -> str:
        """Its line in a config."""
        values = ", ".join(f"{key}: {value}" for key, value in self.options.items())
        return f"dispatcher: {{{values}}}"

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        seconds = None if self.rounds is None else self.rounds.median
        return {"kind": self.kind, "yaml": self.yaml, "seconds": seconds, "fault": self.fault}


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchEvidence:
    """Dispatchers of one MoE layer."""

    own: str
    """Kind that the config has."""
    ep_size: int
    tokens: int
    """Tokens of a rank in one micro-batch."""
    top_k: int
    num_experts: int
    d_model: int
    dtype: str
    speeds: Sequence[DispatcherSpeed] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why the other kinds cannot serve."""

    @property
    def right(self) -> list[DispatcherSpeed]:
        """Those that are right, the fastest first."""
        timed = [(one.rounds.median, index) for index, one in enumerate(self.speeds) if one.rounds is not None]
        return [self.speeds[index] for _, index in sorted(timed)]

    def of(self, kind: str) -> DispatcherSpeed | None:
        """Return the measurement of a kind; None if there is none."""
        return next((one for one in self.speeds if one.kind == kind), None)

    def times_slower(self, kind: str) -> float | None:
        """Return how many times the usual time of the fastest one a kind takes; None unless it is surely slow."""
        one = self.of(kind)
        if one is None or one.rounds is None or self.right[0].rounds is None:
            return None
        return one.rounds.times_slower(self.right[0].rounds.median, _SLOW)

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        shape = {name: value for name, value in asdict(self).items() if name not in ("speeds", "refused")}
        fastest = self.right[0].kind if self.right else None
        return {**shape, "of": [one.record() for one in self.speeds], "fastest": fastest, "refused": dict(self.refused)}
