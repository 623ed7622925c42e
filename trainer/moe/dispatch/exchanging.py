"""Base of all dispatchers that communicate: sizes for all ranks by one wait, and exchanges in the wire dtype."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll, Group
from trainer.distributed.rank_layout import even_slices
from trainer.errors import CommError
from trainer.moe.dispatch.base import Dispatcher

# G ranks of the expert-parallel group.

Wire = Literal["compute", "bfloat16"]
Bounds = Sequence[tuple[int, int]]
"""(G,) first and last + 1 expert of each rank."""


class ExchangingDispatcher(Dispatcher):
    """Dispatcher over the ranks of a group, each of which has an even share of the experts."""

    def __init__(self, group: Group, num_experts: int, wire: Wire = "compute") -> None:
        self.group, self.wire = group, wire
        self.bounds: Bounds = even_slices(num_experts, group.size)
        owners = [rank for rank, (first, end) in enumerate(self.bounds) for _ in range(first, end)]
        self._owner = torch.tensor([*owners, group.size])  # (E + 1,)

    def rank_of(self, expert_index: Tensor) -> Tensor:
        """Return the rank of each expert; G for E, which is none."""
        self._owner = self._owner.to(expert_index.device, non_blocking=True)  # it moves once
        return self._owner[expert_index]

    def gather_counts(self, counts: Tensor) -> tuple[Tensor, list[list[int]]]:
        """Return the counts (n,) of all ranks (G, n), on the device and on the host: the one wait for the device.

        Raises:
            CommError: if the table does not contain this rank's own counts: collectives were mismatched.
        """
        table = self.group.all_gather(counts)  # (G, n)
        *rows, own = torch.cat([table, counts[None]]).tolist()  # waits: sizes become shapes
        if rows[self.group.index] != own or any(count < 0 for row in rows for count in row):
            raise CommError(
                f"rank {self.group.ranks[self.group.index]}: the table of rows for each expert came back changed; "
                "ranks are not in the same collective"
            )
        return table, rows

    def start(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> AllToAll:
        """Start the exchange of rows ordered by receiver; they arrive in the wire dtype, ordered by sender."""
        return self.depart(self.on_wire(rows), sizes)

    def on_wire(self, rows: Tensor) -> Tensor:
        """Return rows in the wire dtype."""
        return rows.bfloat16() if self.wire == "bfloat16" else rows

    def depart(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> AllToAll:
        """Start the exchange of rows in their own dtype."""
        me = self.group.index
        return self.group.start_all_to_all(rows, sizes[me], [row[me] for row in sizes])
