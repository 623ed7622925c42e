"""Sizes of an exchange of rows, and the expert of each row that arrives.

# R rows, E experts, G ranks of the expert-parallel group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangePlan:
    """Send and receive counts of one rank; all ranks derive them from the same table."""

    sizes: list[list[int]]
    """(G, G) rows from each rank to each rank."""
    expert_index: Tensor
    """(R, 1) int64 local expert of each row that arrives, ordered by sender, then expert."""

    @property
    def sizes_back(self) -> list[list[int]]:
        """(G, G) rows from each rank to each rank in the combine."""
        return [list(column) for column in zip(*self.sizes, strict=True)]


def plan_exchange(
    table: Tensor, counts: Sequence[Sequence[int]], bounds: Sequence[tuple[int, int]], index: int
) -> ExchangePlan:
    """Plan the exchange of one rank.

    #  bounds (0, 2) (2, 3)   table [[1, 2, 4],    index 0   send [3, 4]   receive [3, 6]
    #                                [5, 1, 0]]              arrive  0: e0 e1 e1   1: e0 e0 e0 e0 e0 e1

    Args:
        table: (G, E) int64 rows of each rank for each expert.
        counts: the same on the host.
        bounds: (G,) first and last + 1 expert of each rank.
        index: of the rank in the group.
    """
    sizes = [[sum(row[first:end]) for first, end in bounds] for row in counts]  # [from][to]
    first, end = bounds[index]
    expert = torch.arange(end - first, device=table.device).repeat(len(bounds))
    num_rows = sum(row[index] for row in sizes)
    expert = expert.repeat_interleave(table[:, first:end].reshape(-1), output_size=num_rows)
    return ExchangePlan(sizes=sizes, expert_index=expert[:, None])
