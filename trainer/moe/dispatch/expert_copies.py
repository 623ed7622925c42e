"""Copies of busy experts on other ranks: their weights travel with every pass, and their gradients back.

A copy has no state. It is what its expert is in this pass, so there is nothing to keep equal, to average or to save:
the gradient of the expert is the sum over its places, by the backward pass of the exchange.

# c experts that this rank lends, n copies that it gets.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainer.distributed.collectives import Group


class ExpertCopies:
    """Experts that a rank lends and borrows in one layer."""

    def __init__(self, group: Group, lent: Sequence[Sequence[int]], borrowed: Sequence[int]) -> None:
        """Keep the plan: for each rank, the local experts that go there, and how many come from there."""
        self._group = group
        self._index = torch.tensor([expert for of_rank in lent for expert in of_rank], dtype=torch.int64)  # (c,)
        self._send, self._receive = [len(of_rank) for of_rank in lent], list(borrowed)

    def start(self, experts: nn.Module) -> Callable[[], dict[str, Tensor]]:
        """Start to send the weights of local experts, whose dimension 0 is the expert. Collective.

        What is returned waits for those of the copies here (n, ...), by name, ordered by the rank that they are from.
        """
        exchanges = {}
        for name, weight in experts.named_parameters():
            self._index = self._index.to(weight.device, non_blocking=True)
            rows = weight.index_select(0, self._index)
            exchanges[name] = self._group.start_all_to_all(rows, self._send, self._receive)
        return lambda: {name: exchange.wait() for name, exchange in exchanges.items()}
