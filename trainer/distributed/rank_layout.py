"""Layout of ranks: plain numbers, checked before any process group exists. Imports no torch.

rank = edp_rank * ep_size + ep_rank       world 6, ep_size 3    edp 0: ranks 0 1 2
                                                                edp 1: ranks 3 4 5
                                          experts split over the columns, copied down the rows
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.environment import is_first, local_size_and_rank, world_size_and_rank
from trainer.errors import ConfigError


def format_ranks(ranks: Sequence[int]) -> str:
    """Return ranks in words: rank 1, or ranks 0, 2 and 3."""
    *before, last = ranks
    return f"ranks {', '.join(map(str, before))} and {last}" if before else f"rank {last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One rank's place among all ranks."""

    world_size: int = 1
    rank: int = 0
    ep_size: int = 1
    """Ranks that share one copy of the experts: neighbours, on one node first."""
    ranks_per_node: int = 1
    """Ranks on every machine."""

    @property
    def edp_size(self) -> int:
        """Copies of the experts."""
        return self.world_size // self.ep_size

    @property
    def ep_rank(self) -> int:
        """This rank's number among those that share its copy of the experts."""
        return self.rank % self.ep_size

    @property
    def edp_rank(self) -> int:
        """Index of the copy of the experts that this rank belongs to."""
        return self.rank // self.ep_size

    def ep_ranks(self) -> list[list[int]]:
        """Return the ranks of every copy of the experts."""
        return [list(range(first, first + self.ep_size)) for first in range(0, self.world_size, self.ep_size)]

    @property
    def nodes_of_ep(self) -> int:
        """Nodes that one copy of the experts is spread over; 1 if its ranks do not fill whole nodes."""
        inside = self.ranks_per_node
        return self.ep_size // inside if 1 < inside < self.ep_size and self.ep_size % inside == 0 else 1

    def ep_inside_ranks(self) -> list[list[int]]:
        """Return the ranks of every copy of the experts, node by node."""
        size = self.ep_size // self.nodes_of_ep
        return [list(range(first, first + size)) for first in range(0, self.world_size, size)]

    def ep_between_ranks(self) -> list[list[int]]:
        """Return, for every copy of the experts and place on a node, the ranks with that place, one of each node."""
        size = self.ep_size // self.nodes_of_ep
        return [ep[place::size] for ep in self.ep_ranks() for place in range(size)]

    def edp_ranks(self) -> list[list[int]]:
        """Return, for every part of the experts, the ranks that hold it."""
        return [list(range(first, self.world_size, self.ep_size)) for first in range(self.ep_size)]


def layout_from_environment(*, ep_size: int) -> Layout:
    """Return this process's place among those that torchrun started; alone without torchrun.

    Raises:
        ConfigError: if `ep_size` does not fit the number of ranks.
    """
    world_size, rank = world_size_and_rank()
    check_layout(world_size=world_size, ep_size=ep_size)
    return Layout(world_size=world_size, rank=rank, ep_size=ep_size, ranks_per_node=local_world_size() or world_size)


def local_world_size() -> int | None:
    """Return how many ranks torchrun or DeepSpeed's launcher has started on this machine; None if it is not said."""
    return local_size_and_rank()[0]


def is_first_rank() -> bool:
    """Tell whether this process is the one that speaks where all would say the same."""
    return is_first("RANK")


def is_first_on_node() -> bool:
    """Tell whether this process is the one that does what is to be done once on each machine."""
    return is_first("LOCAL_RANK")


def even_slice(total: int, parts: int, index: int) -> tuple[int, int]:
    """Return first and last + 1 of part `index` when 0 .. total - 1 is cut into neighbouring parts.

    Sizes differ by at most one: 8 experts over 3 ranks are 0 1 | 2 3 4 | 5 6 7.
    """
    return total * index // parts, total * (index + 1) // parts


def even_slices(total: int, parts: int) -> list[tuple[int, int]]:
    """Return every part's first and last + 1, in order."""
    return [even_slice(total, parts, index) for index in range(parts)]


def check_layout(*, world_size: int, ep_size: int) -> None:
    """Refuse degrees that do not fit together.

    Raises:
        ConfigError: naming each factor, and what would fit.
    """
    if world_size % ep_size:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ConfigError(
            f"parallel.ep_size: {ep_size} does not divide the {world_size} ranks that were started; use one of "
            f"{fitting}, or start a multiple of {ep_size} (torchrun --nproc-per-node, --nnodes)"
        )
