"""All-to-all dispatcher with dynamic sizes, and its overlap of communication and computation."""

from collections.abc import Sequence
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
from trainer.ops.permute import permute_rows, unpermute_rows

# T tokens, k slots, R rows here, E experts, G ranks of the expert-parallel group, D d_model.


Wire = Literal["compute", "bfloat16"]
Bounds = Sequence[tuple[int, int]]
"""(G,) first and last + 1 expert of each rank."""


class AllToAllDispatcher(Dispatcher):
    """Sends every row to the rank of its expert, dropless.

    The ranks all-gather their row counts per expert, and each derives all sizes from the same (G, E) table. Rows arrive
    ordered by sender and are permuted into expert order. Senders are in the order of their tokens, so an expert sees
    its rows in the same order under every layout.

    With several chunks, a rank's experts are split into as many parts, and the rows of one part are communicated while
    another part is computed; see `Chunks`. No sum changes, not even its order.
    """

    def __init__(self, group: Group, num_experts: int, wire: Wire = "compute", num_chunks: int = 1) -> None:
        self.group, self.wire = group, wire
        self.bounds = even_slices(num_experts, group.size)
        self.chunks = Chunks.of(self.bounds, num_chunks)

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send the row of each kept assignment to its expert."""
        order, rows, (plan,) = self.prepare(x, decision, [self.bounds])
        arrived = permute_rows(self.send(rows, plan.sizes), plan.order)
        return Dispatched(x=arrived, rows_per_expert=plan.rows_per_expert, handle=(order, plan))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Combined:
        """Send every row back and sum the rows of each token."""
        order, plan = dispatched.handle
        rows = self.send(unpermute_rows(y, plan.order), plan.sizes_back)
        return Combined.of(rows, order, is_compiled=self.is_compiled)

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Combined:
        """Dispatch, compute and combine chunk by chunk, overlapping communication and computation."""
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
                arrived = permute_rows(exchange.wait().to(x.dtype), plan.order)
            with within("experts"):
                y = experts(arrived, plan.rows_per_expert, part)
            with within("combine"):
                back.append(self.start(unpermute_rows(y, plan.order), plan.sizes_back))
        with within("combine"):
            rows = torch.cat([exchange.wait() for exchange in back]).to(x.dtype)
            return Combined.of(rows, order, is_compiled=self.is_compiled)

    def prepare(
        self, x: Tensor, decision: RoutingDecision, chunks: Sequence[Bounds]
    ) -> tuple[ExpertOrder, Tensor, list[ExchangePlan]]:
        """Order the rows of x (T, D) by expert, and plan the exchange of each of these consecutive chunks."""
        order = group_by_expert(decision)
        counts = self.group.all_gather(order.rows_per_expert)  # (G, E)
        self.check(counts, order)
        plans = [plan_exchange(counts, bounds, self.group.index) for bounds in chunks]  # waits: sizes become shapes
        return order, order.gather(x), plans

    def send(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """Exchange rows in the wire dtype; sizes (G, G) are the rows from each rank to each rank."""
        return self.start(rows, sizes).wait().to(rows.dtype)

    def start(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> AllToAll:
        """Start the exchange of rows ordered by receiver; they arrive in the wire dtype, ordered by sender."""
        return self.depart(rows.bfloat16() if self.wire == "bfloat16" else rows, sizes)

    def depart(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> AllToAll:
        """Start the exchange of rows in their own dtype."""
        me = self.group.index
        return self.group.start_all_to_all(rows, sizes[me], [row[me] for row in sizes])

    def check(self, counts: Tensor, order: ExpertOrder) -> None:
        """Raise if the gathered table does not contain this rank's own counts: collectives were mismatched."""
        if not torch.equal(counts[self.group.index], order.rows_per_expert) or bool((counts < 0).any()):
            raise CommError(
                f"rank {self.group.ranks[self.group.index]}: the table of rows for each expert came back changed; "
                "ranks are not in the same collective"
            )
