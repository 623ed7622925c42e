"""Measurements of the ranks and links of a cluster, which its checks look at. Imports no torch."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.doctor.cluster.step_overheads import StepOverheads
from trainer.doctor.cluster.timed_rounds import COLLECTIVES, CollectiveSpeed, Rounds
from trainer.doctor.finding import Check

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpeed:
    """Speeds of one rank: products and copies."""

    rank: int
    host: str
    node: int
    matmul: Rounds
    copy: Rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """An exchange between two ranks while no other rank sends anything."""

    ranks: tuple[int, int]
    nodes: tuple[int, int]
    exchange: Rounds
    """Seconds for `num_bytes` in both directions."""
    latency: Rounds
    """Seconds for a message that is next to nothing."""

    @property
    def is_inside(self) -> bool:
        """Whether both ranks are on one machine."""
        return self.nodes[0] == self.nodes[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """By how much a rank's clock is ahead of rank 0's: surely between these bounds."""

    rank: int
    least_s: float
    most_s: float

    @property
    def at_least_s(self) -> float:
        """The distance that is certain."""
        return max(0.0, self.least_s, -self.most_s)

    @property
    def middle_s(self) -> float:
        """The middle of the bounds."""
        return (self.least_s + self.most_s) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvidence:
    """Ranks, links and collectives."""

    ranks: Sequence[RankSpeed] = ()
    links: Sequence[LinkSpeed] = ()
    collectives: Mapping[str, Sequence[CollectiveSpeed]] = field(default_factory=dict)
    """By name; all of the same sizes."""
    overheads: StepOverheads | None = None
    clocks: Sequence[ClockOffset] = ()
    matmul_flops: float = 0.0
    copy_bytes: float = 0.0
    """Read and written."""
    link_bytes: int = 0
    """Sent in each direction of a link."""
    device: str = "cpu"
    dtype: str = "float32"
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Versions and variables that differ between ranks, by name: one value for each rank."""
    seconds: float = 0.0
    """All of the measurement."""

    @property
    def matmul_rate(self) -> float:
        """FLOP/s of the median rank."""
        return self.matmul_flops / statistics.median(rank.matmul.median for rank in self.ranks)

    @property
    def memory_rate(self) -> float:
        """Bytes/s of the median rank."""
        return self.copy_bytes / statistics.median(rank.copy.median for rank in self.ranks)

    def record(self) -> dict[str, Any]:
        """Return JSON values, which `plan --links` reads."""
        return {
            "schema": SCHEMA,
            "ranks": len(self.ranks),
            **{name: [one.record() for one in self.collectives.get(name, ())] for name in COLLECTIVES},
            **({} if self.overheads is None else self.overheads.record()),
            "matmul_flops_per_s": self.matmul_rate,
            "memory_bytes_per_s": self.memory_rate,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "by_rank": [
                {
                    "rank": one.rank,
                    "host": one.host,
                    "matmul_flops_per_s": self.matmul_flops / one.matmul.median,
                    "memory_bytes_per_s": self.copy_bytes / one.copy.median,
                }
                for one in self.ranks
            ],
            "links": [
                {
                    "ranks": list(one.ranks),
                    "nodes": list(one.nodes),
                    "bytes_per_s": self.link_bytes / one.exchange.median,
                    "latency_s": one.latency.median,
                }
                for one in self.links
            ],
            "clocks": [{"rank": one.rank, "least_s": one.least_s, "most_s": one.most_s} for one in self.clocks],
        }


ClusterCheck = Check[ClusterEvidence]
