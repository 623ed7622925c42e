"""Chunks of a rank's experts, so that communication of one chunk overlaps computation of another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed.rank_layout import even_slices
from trainer.moe.routing import RoutingDecision

# E experts, G ranks of the expert-parallel group.


@dataclass(frozen=True, slots=True)
class Chunks:
    """Renumbering of the experts, chunk by chunk, so that the rows of one chunk are contiguous.

    #  8 experts on 2 ranks, 2 chunks      rank 0: 0 1 | 2 3      rank 1: 4 5 | 6 7
    #  in the new order                    0 1 4 5 | 2 3 6 7      expert 4 becomes number 2
    #  bounds, in new numbers              (0, 2) (2, 4)  |  (4, 6) (6, 8)
    """

    bounds: Sequence[Sequence[tuple[int, int]]]
    """For each chunk, first and last + 1 new number on each rank."""
    new_number: Tensor
    """(E,) new number of each expert."""
    of_rank: Sequence[Sequence[tuple[int, int]]]
    """For each rank, first and last + 1 of its local experts in each chunk."""

    @classmethod
    def of(cls, experts: Sequence[tuple[int, int]], num_chunks: int) -> "Chunks":
        """Split each rank's experts, given as (first, last + 1), into chunks."""
        of_rank = [even_slices(end - first, num_chunks) for first, end in experts]
        order, bounds = [], []
        for chunk in range(num_chunks):
            bounds.append([])
            for (start, _), parts in zip(experts, of_rank, strict=True):
                first, end = parts[chunk]
                bounds[-1].append((len(order), len(order) + end - first))
                order += range(start + first, start + end)
        return cls(bounds, torch.tensor(order).argsort(), of_rank)

    def renumbered(self, decision: RoutingDecision) -> RoutingDecision:
        """Return the decision in new numbers; null experts keep theirs."""
        return decision.renumbered(self.new_number.to(decision.expert_index.device))
