"""Rows travel to the rank of their expert and back, any number of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll, Group
from trainer.distributed.rank_layout import even_slices
from trainer.errors import CommError
from trainer.moe.dispatch.base import Combined, Dispatched, Dispatcher, RunExperts
from trainer.moe.dispatch.chunks import Chunks
from trainer.moe.dispatch.order import ExchangePlan, ExpertOrder, group_by_expert, plan_exchange
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import inverse_permute, permute

# T tokens, k slots, R rows here, E experts, G ranks that share the experts, D d_model.


Wire = Literal["compute", "bfloat16"]
Bounds = Sequence[tuple[int, int]]
"""(G,) first and last + 1 expert of each rank."""


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """State that `combine` needs from `dispatch`."""

    order: ExpertOrder
    plan: ExchangePlan


class AllToAllDispatcher(Dispatcher):
    """Sends every row to the rank that has its expert: any number of rows, none dropped.

    The ranks first tell each other how many rows they have for each expert, and everyone works out all sizes from that
    one (G, E) table. Rows arrive by sender and are put into expert order; senders are in the order of their tokens,
    so an expert sees its rows in the same order under every layout.

    With several chunks a rank's experts are cut into as many parts, and the rows of one part travel while another part
    is computed; see `Chunks`. No sum changes by it, not even its order.
    """

    def __init__(self, group: Group, num_experts: int, wire: Wire = "compute", num_chunks: int = 1) -> None:
        """Prepare the sending.

        Args:
            group: ranks that share the experts.
            num_experts: E, cut into neighbouring parts.
            wire: precision of rows on their way.
            num_chunks: parts that a rank's experts are cut into.
        """
        self.group, self.wire = group, wire
        self.bounds = even_slices(num_experts, group.size)
        self.chunks = Chunks.of(self.bounds, num_chunks)

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send each kept assignment's row to its expert."""
        order, rows, (plan,) = self.prepare(x, decision, [self.bounds])
        arrived = permute(self.send(rows, plan.sizes), plan.order)
        return Dispatched(x=arrived, rows_per_expert=plan.rows_per_expert, handle=DispatchHandle(order, plan))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Combined:
        """Send every row back and sum each token's."""
        sent: DispatchHandle = dispatched.handle
        rows = self.send(inverse_permute(y, sent.plan.order), sent.plan.sizes_back)
        return Combined.of(rows, sent.order, is_compiled=self.is_compiled)

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Combined:
        """Return what the experts make of x (T, D): part by part, each computed while others are under way."""
        if len(self.chunks.bounds) == 1:
            return super().forward(x, decision, experts)
        within = self.step_timer.within
        with within("dispatch"):
            order, rows, plans = self.prepare(x, self.chunks.renumbered(decision), self.chunks.bounds)
            parts = rows.split([sum(plan.sizes[self.group.index]) for plan in plans])
            there = [self.start(part, plan.sizes) for part, plan in zip(parts, plans, strict=True)]
        back = []
        for exchange, plan, part in zip(there, plans, self.chunks.of_rank[self.group.index], strict=True):
            with within("dispatch"):
                arrived = permute(exchange.wait().to(x.dtype), plan.order)
            with within("experts"):
                y = experts(arrived, plan.rows_per_expert, part)
            with within("combine"):
                back.append(self.start(inverse_permute(y, plan.order), plan.sizes_back))
        with within("combine"):
            rows = torch.cat([exchange.wait() for exchange in back]).to(x.dtype)
            return Combined.of(rows, order, is_compiled=self.is_compiled)

    def prepare(
        self, x: Tensor, decision: RoutingDecision, cuts: Sequence[Bounds]
    ) -> tuple[ExpertOrder, Tensor, list[ExchangePlan]]:
        """Order the rows of x (T, D) by expert, and plan an exchange for each of the cuts, which follow each other."""
        order = group_by_expert(decision)
        counts = self.group.all_gather(order.rows_per_expert)  # (G, E)
        self.check(counts, order)
        plans = [plan_exchange(counts, bounds, self.group.index) for bounds in cuts]  # waits: sizes become shapes
        return order, order.gather(x), plans

    def send(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """Exchange rows in the wire dtype; sizes (G, G) has the rows from each rank to each."""
        return self.start(rows, sizes).wait().to(rows.dtype)

    def start(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> AllToAll:
        """Begin to exchange rows, ordered by receiver; they arrive in the wire dtype, ordered by sender."""
        return self.depart(rows.bfloat16() if self.wire == "bfloat16" else rows, sizes)

    def depart(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> AllToAll:
        """Begin to exchange rows as they are."""
        me = self.group.index
        return self.group.start_all_to_all(rows, sizes[me], [row[me] for row in sizes])

    def check(self, counts: Tensor, order: ExpertOrder) -> None:
        """Refuse a table whose row of this rank is not what this rank said: another collective was crossed with it."""
        if not torch.equal(counts[self.group.index], order.rows_per_expert) or bool((counts < 0).any()):
            raise CommError(
                f"rank {self.group.ranks[self.group.index]}: the table of rows for each expert came back changed; "
                "ranks are not in the same collective"
            )
