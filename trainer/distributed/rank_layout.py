"""Layout of ranks in an expert-parallel grid, checked before any process group exists. Imports no torch.

rank = pp_rank * stage_size + ...         a stage of a pipeline: consecutive ranks with the same layers, in which all
                                          that follows is
rank = edp_rank * ep_size + ep_rank       world 6, ep_size 3    edp 0: ranks 0 1 2
                                                                edp 1: ranks 3 4 5
                                          experts sharded over the columns, replicated down the rows
rank = data_rank * row_size + row_rank    row_size 2: ranks 0 1, ranks 2 3 and ranks 4 5 each have the same rows of
                                          data, and each of a pair has other columns of them. Experts are spread over
                                          all ranks whatever their rows: ep_size and row_size need not fit each other
row_rank = cp_rank * tp_size + tp_rank    tp ranks, each with other heads, see their columns together; cp ranks with the
                                          same heads attend together
shard_size: neighbouring ranks that shard weights together; with 3, each edp row above holds all dense weights once;
what tp ranks cut is sharded over those of such a group that hold the same cut
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from trainer.environment import is_first, local_size_and_rank, world_size_and_rank
from trainer.errors import ConfigError

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipe_v"]
V_SCHEDULES = ("zbv", "dualpipe_v")
"""Schedules under which the first stage and the last one are on the same ranks."""


def format_ranks(ranks: Sequence[int]) -> str:
    """Return `rank 1`, or `ranks 0, 2 and 3`."""
    *before, last = ranks
    return f"ranks {', '.join(map(str, before))} and {last}" if before else f"rank {last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """Sizes of the groups that all ranks are divided into: what a config says of a layout."""

    ep_size: int = 1
    """Ranks that shard one copy of the experts: consecutive ranks, so on one node if possible."""
    shard_size: int | None = None
    """Neighbouring ranks that together hold one copy of sharded weights; None: all ranks of a stage."""
    cp_size: int = 1
    """Ranks that share rows: consecutive ranks, each with some columns of the same rows."""
    tp_size: int = 1
    """Ranks that hold one copy of attention and dense feed-forward together: consecutive ranks, which share rows."""
    pp_size: int = 1
    """Groups of ranks that the layers are split over: each is consecutive ranks."""
    pp_schedule: ScheduleName = "1f1b"
    pp_layers: tuple[int, ...] | None = None
    """Layers of each stage; None: of about the same cost."""

    @classmethod
    def of(cls, source: object) -> "Degrees":
        """Return the sizes that a section of a config or a layout has, by their names."""
        return Degrees(**{field.name: getattr(source, field.name) for field in fields(Degrees)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(Degrees):
    """Position of one rank in the grid."""

    world_size: int = 1
    rank: int = 0
    ranks_per_node: int = 1

    @property
    def degrees(self) -> Degrees:
        """The sizes alone, equal on all ranks."""
        return Degrees.of(self)

    @property
    def row_size(self) -> int:
        """Number of ranks that share rows."""
        return self.cp_size * self.tp_size

    @property
    def row_rank(self) -> int:
        """Index of this rank among those that share its rows."""
        return self.rank % self.row_size

    @property
    def data_rank(self) -> int:
        """Index of this rank's rows: ranks with the same index share rows."""
        return self.rank % self.stage_size // self.row_size

    @property
    def data_size(self) -> int:
        """Number of groups of ranks that have different rows."""
        return self.stage_size // self.row_size

    def row_ranks(self) -> list[list[int]]:
        """Return the ranks that share rows, for all rows."""
        return _runs(list(range(self.world_size)), self.row_size)

    def cp_ranks(self) -> list[list[int]]:
        """Return the ranks that attend to a row together with the same heads, for all rows and cuts of the heads."""
        return [ranks[first :: self.tp_size] for ranks in self.row_ranks() for first in range(self.tp_size)]

    def tp_ranks(self) -> list[list[int]]:
        """Return the ranks of each copy of attention and dense feed-forward."""
        return _runs(list(range(self.world_size)), self.tp_size)

    def tdp_ranks(self) -> list[list[int]]:
        """Return, for each cut of attention and dense feed-forward, the ranks that hold it."""
        return [stage[first :: self.tp_size] for stage in self.stage_ranks() for first in range(self.tp_size)]

    @property
    def stage_size(self) -> int:
        """Number of ranks with the same layers."""
        return self.world_size // self.pp_size

    @property
    def pp_rank(self) -> int:
        """Index of this rank's stage."""
        return self.rank // self.stage_size

    @property
    def is_first_of_stage(self) -> bool:
        """True if no earlier rank has the same layers."""
        return self.rank % self.stage_size == 0

    def stage_ranks(self) -> list[list[int]]:
        """Return the ranks of each stage."""
        return _runs(list(range(self.world_size)), self.stage_size)

    def pp_ranks(self) -> list[list[int]]:
        """Return the ranks that hold one copy of the layers together, in the order of the stages."""
        return _columns(self.stage_ranks())

    def tied_ranks(self) -> list[list[int]]:
        """Return, for each copy of the layers, the ranks with the first and the last one; every other rank alone."""
        if self.pp_schedule in V_SCHEDULES:
            return [[rank] for rank in range(self.world_size)]
        ends = [sorted({ranks[0], ranks[-1]}) for ranks in self.pp_ranks()]
        return ends + [[rank] for ranks in self.pp_ranks() for rank in ranks[1:-1]]

    @property
    def ep_rank(self) -> int:
        """Index of this rank among those that shard its copy of the experts."""
        return self.rank % self.ep_size

    @property
    def edp_rank(self) -> int:
        """Index of this rank's copy of the experts."""
        return self.rank % self.stage_size // self.ep_size

    def ep_ranks(self) -> list[list[int]]:
        """Return the ranks of each copy of the experts."""
        return [list(range(first, first + self.ep_size)) for first in range(0, self.world_size, self.ep_size)]

    @property
    def nodes_of_ep(self) -> int:
        """Nodes that one copy of the experts spans; 1 if its ranks do not fill whole nodes."""
        inside = self.ranks_per_node
        return self.ep_size // inside if 1 < inside < self.ep_size and self.ep_size % inside == 0 else 1

    def ep_inside_ranks(self) -> list[list[int]]:
        """Return the ranks of each copy of the experts on each node."""
        size = self.ep_size // self.nodes_of_ep
        return [list(range(first, first + size)) for first in range(0, self.world_size, size)]

    def ep_between_ranks(self) -> list[list[int]]:
        """Return, for each copy of the experts and local rank, the ranks with that local rank, one per node."""
        size = self.ep_size // self.nodes_of_ep
        return [ep[local::size] for ep in self.ep_ranks() for local in range(size)]

    def edp_ranks(self) -> list[list[int]]:
        """Return, for each shard of the experts, the ranks that hold it."""
        return [stage[first :: self.ep_size] for stage in self.stage_ranks() for first in range(self.ep_size)]

    @property
    def num_shards(self) -> int:
        """Number of ranks that share a copy of the dense weights, if these are sharded."""
        return self.shard_size or self.stage_size

    @property
    def num_expert_shards(self) -> int:
        """Number of ranks that share a copy of the same experts, if these are sharded."""
        return max(1, self.num_shards // self.ep_size)

    def shard_ranks(self) -> list[list[int]]:
        """Return the ranks that together hold one copy of the dense weights, if these are sharded."""
        return _runs(list(range(self.world_size)), self.num_shards)

    def shard_copy_ranks(self) -> list[list[int]]:
        """Return, for each shard of the dense weights, the ranks that hold it."""
        return [column for stage in self.stage_ranks() for column in _columns(_runs(stage, self.num_shards))]

    def edp_shard_ranks(self) -> list[list[int]]:
        """Return the ranks that together hold one copy of an expert-parallel rank's experts, if these are sharded.

        They are those of its replicas that are in one group of `shard_ranks`; one alone if none is.
        """
        return [run for edp in self.edp_ranks() for run in _runs(edp, self.num_expert_shards)]

    def edp_shard_copy_ranks(self) -> list[list[int]]:
        """Return, for each shard of an expert-parallel rank's experts, the ranks that hold it."""
        return [column for edp in self.edp_ranks() for column in _columns(_runs(edp, self.num_expert_shards))]

    @property
    def num_cut_shards(self) -> int:
        """Number of ranks that share a copy of the same cut, if weights are sharded."""
        return max(1, self.num_shards // self.tp_size)

    def tdp_shard_ranks(self) -> list[list[int]]:
        """Return the ranks that together hold one copy of a tensor-parallel rank's cut, if weights are sharded."""
        return [run for tdp in self.tdp_ranks() for run in _runs(tdp, self.num_cut_shards)]

    def tdp_shard_copy_ranks(self) -> list[list[int]]:
        """Return, for each shard of a tensor-parallel rank's cut, the ranks that hold it."""
        return [column for tdp in self.tdp_ranks() for column in _columns(_runs(tdp, self.num_cut_shards))]


def _runs(ranks: list[int], size: int) -> list[list[int]]:
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]


def _columns(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def layout_from_environment(degrees: Degrees) -> Layout:
    """Return this process's layout by its launcher's variables, if any; a ConfigError if a degree does not fit."""
    world_size, rank = world_size_and_rank()
    check_layout(degrees, world_size=world_size)
    ranks_per_node = local_world_size() or world_size
    return Layout(world_size=world_size, rank=rank, ranks_per_node=ranks_per_node, **asdict(degrees))


def local_world_size() -> int | None:
    """Return the number of ranks that a launcher started on this node; None if unknown."""
    return local_size_and_rank()[0]


def is_first_rank() -> bool:
    """Return whether this is rank 0, which prints messages that all ranks share."""
    return is_first("RANK")


def is_first_on_node() -> bool:
    """Return whether this is local rank 0, which does the work that is done once per node."""
    return is_first("LOCAL_RANK")


def even_slice(total: int, parts: int, index: int) -> tuple[int, int]:
    """Return (start, end) of part `index` if 0 .. total - 1 is split into consecutive parts.

    Sizes differ by at most one: 8 experts over 3 ranks are 0 1 | 2 3 4 | 5 6 7.
    """
    return total * index // parts, total * (index + 1) // parts


def even_slices(total: int, parts: int) -> list[tuple[int, int]]:
    """Return (start, end) of all parts, in order."""
    return [even_slice(total, parts, index) for index in range(parts)]


def check_layout(degrees: Degrees, *, world_size: int) -> None:
    """Raise a ConfigError unless the degrees divide the number of ranks, and fit each other; it names those that do."""
    if world_size % degrees.pp_size:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ConfigError(
            f"parallel.pp_size: {degrees.pp_size} does not divide the {world_size} ranks that were started; use one of "
            f"{fitting}, or start a multiple of {degrees.pp_size} (torchrun --nproc-per-node, --nnodes)"
        )
    ep_size, shard_size, stage_size = degrees.ep_size, degrees.shard_size, world_size // degrees.pp_size
    ranks = f"{world_size} ranks that were started" if degrees.pp_size == 1 else f"{stage_size} ranks of a stage"
    divisors = [n for n in range(1, stage_size + 1) if stage_size % n == 0]
    cp_size, tp_size = degrees.cp_size, degrees.tp_size
    for key, size in (("ep_size", ep_size), ("cp_size", cp_size), ("tp_size", tp_size)):
        if stage_size % size:
            raise ConfigError(
                f"parallel.{key}: {size} does not divide the {ranks}; use one of "
                f"{', '.join(map(str, divisors))}, or start a multiple of {size} (torchrun --nproc-per-node, --nnodes)"
            )
    if stage_size % (cp_size * tp_size):
        raise ConfigError(
            f"parallel.tp_size: {tp_size} times cp_size {cp_size} ranks share rows, which does not divide the {ranks}; "
            f"use sizes whose product is one of {', '.join(map(str, divisors))}"
        )
    if shard_size is None:
        return
    fitting = [n for n in divisors if n > 1 and all(_fits(n, size) for size in (ep_size, tp_size))]
    if stage_size % shard_size or not all(_fits(shard_size, size) for size in (ep_size, tp_size)):
        advice = f"{', '.join(map(str, fitting))}, or null for all ranks" if fitting else "null"
        of_cuts = "" if tp_size == 1 else f", and of tp_size {tp_size}"
        raise ConfigError(
            f"parallel.shard_size: {shard_size} must divide the {ranks}, and divide or be "
            f"a multiple of ep_size {ep_size}{of_cuts}; use {advice}"
        )


def _fits(shard_size: int, size: int) -> bool:
    return shard_size % size == 0 or size % shard_size == 0
