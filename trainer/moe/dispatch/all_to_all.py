"""Rows travel to the rank of their expert and back, any number of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.distributed.layout import even_slices
from trainer.errors import CommError
from trainer.moe.dispatch.base import Dispatched, Dispatcher
from trainer.moe.dispatch.order import ExchangePlan, ExpertOrder, group_by_expert, plan_exchange
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import inverse_permute, permute

# T tokens, k slots, R rows here, E experts, G ranks that share the experts, D d_model.


Wire = Literal["compute", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Sent:
    """What `combine` must know of a `dispatch`."""

    order: ExpertOrder
    plan: ExchangePlan


class AllToAllDispatcher(Dispatcher):
    """Sends every row to the rank that has its expert: any number of rows, none dropped.

    The ranks first tell each other how many rows they have for each expert, and everyone works out all sizes from that
    one (G, E) table. Rows arrive by sender and are put into expert order; senders are in the order of their tokens,
    so an expert sees its rows in the same order under every layout.
    """

    def __init__(self, group: Group, num_experts: int, wire: Wire = "compute") -> None:
        """Prepare the sending.

        Args:
            group: ranks that share the experts.
            num_experts: E, cut into neighbouring parts.
            wire: precision of rows on their way.
        """
        self.group, self.wire = group, wire
        self.bounds = even_slices(num_experts, group.size)

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send each kept assignment's row to its expert."""
        order = group_by_expert(decision)
        counts = self.group.gather(order.rows_per_expert)  # (G, E)
        self.check(counts, order)
        plan = plan_exchange(counts, self.bounds, self.group.index)  # waits for the device: sizes become shapes
        arrived = permute(self.send(order.gather(x), plan.sizes), plan.order)
        return Dispatched(x=arrived, rows_per_expert=plan.rows_per_expert, handle=Sent(order, plan))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Send every row back and sum each token's with their weights, in slot order."""
        sent: Sent = dispatched.handle
        rows = self.send(inverse_permute(y, sent.plan.order), sent.plan.sizes_back)
        return sent.order.combine(rows, is_compiled=self.is_compiled)

    def send(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """Exchange rows in the wire dtype; sizes (G, G) has the rows from each rank to each."""
        return self.travel(rows.bfloat16() if self.wire == "bfloat16" else rows, sizes).to(rows.dtype)

    def travel(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """Send rows, ordered by receiver; return those that arrive, ordered by sender."""
        me = self.group.index
        return self.group.exchange(rows, sizes[me], [row[me] for row in sizes])

    def check(self, counts: Tensor, order: ExpertOrder) -> None:
        """Refuse a table whose row of this rank is not what this rank said: another collective was crossed with it."""
        if not torch.equal(counts[self.group.index], order.rows_per_expert) or bool((counts < 0).any()):
            raise CommError(
                f"rank {self.group.ranks[self.group.index]}: the table of rows for each expert came back changed; "
                "ranks are not in the same collective"
            )
