"""All-to-all dispatcher with dynamic sizes, and its overlap of communication and computation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll, Group
from trainer.distributed.rank_layout import even_slices
from trainer.errors import CommError
from trainer.moe.dispatch.base import Dispatched, Dispatcher, RunExperts
from trainer.moe.dispatch.chunks import Chunks
from trainer.moe.dispatch.exchange_plan import ExchangePlan, plan_exchange
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.expert_order import ExpertOrder, order_by_expert
from trainer.ops.permute import gather_rows, sum_rows

# T tokens, k slots, R rows here, E experts, G ranks of the expert-parallel group, D d_model.


Wire = Literal["compute", "bfloat16"]
Bounds = Sequence[tuple[int, int]]
"""(G,) first and last + 1 expert of each rank."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Rows of this rank's tokens, ready to be sent."""

    order: ExpertOrder
    rows: Tensor
    """(R, D)."""
    weight: Tensor
    """(R, 1) combine weights."""
    plans: Sequence[ExchangePlan]
    """Of each chunk."""


class AllToAllDispatcher(Dispatcher):
    """Sends every row to the rank of its expert, dropless.

    The ranks all-gather their row counts per expert, and each derives all sizes from the same (G, E) table. Rows arrive
    ordered by sender, and senders are in the order of their tokens, so an expert sees its rows in the same order under
    every layout. It applies the combine weights, so rows only have to be summed when they are back.

    With several chunks, a rank's experts are split into as many parts, and the rows of one part are communicated while
    another part is computed; see `Chunks`. No sum changes, not even its order.
    """

    def __init__(self, group: Group, num_experts: int, wire: Wire = "compute", num_chunks: int = 1) -> None:
        self.group, self.wire = group, wire
        self.bounds = even_slices(num_experts, group.size)
        self.chunks = Chunks.of(self.bounds, num_chunks)

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send a row for each kept assignment, with its combine weight, to its expert."""
        outgoing = self.prepare(x, decision, [self.bounds])
        (plan,) = outgoing.plans
        exchange = self.start_rows(outgoing.rows, outgoing.weight, plan)
        return exchange.dispatched(handle=(outgoing.order, plan), dtype=compute_dtype(x))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Send every row back and sum the rows of each token."""
        order, plan = dispatched.handle
        rows = self.send(y, plan.sizes_back)
        return sum_rows(rows, order, dtype=torch.promote_types(y.dtype, dispatched.weight.dtype))

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Tensor:
        """Dispatch, compute and combine chunk by chunk, overlapping communication and computation."""
        if len(self.chunks.bounds) == 1:
            return super().forward(x, decision, experts)
        within = self.step_timer.within
        with within("dispatch"):
            outgoing = self.prepare(x, self.chunks.renumbered(decision), self.chunks.bounds)
            sent = [sum(plan.sizes[self.group.index]) for plan in outgoing.plans]
            parts = zip(outgoing.rows.split(sent), outgoing.weight.split(sent), outgoing.plans, strict=True)
            there = [self.start_rows(rows, weight, plan) for rows, weight, plan in parts]
        back = []
        for exchange, part in zip(there, self.chunks.of_rank[self.group.index], strict=True):
            with within("dispatch"):
                here = exchange.dispatched(handle=None, dtype=compute_dtype(x))
            with within("experts"):
                y = experts(here.x, here.expert_index, here.weight, num_rows=here.num_rows, part=part)
            with within("combine"):
                back.append(self.start(y, exchange.plan.sizes_back))
        with within("combine"):
            rows = torch.cat([exchange.wait() for exchange in back])
            return sum_rows(rows, outgoing.order, dtype=torch.promote_types(x.dtype, decision.combine_weight.dtype))

    def prepare(self, x: Tensor, decision: RoutingDecision, chunks: Sequence[Bounds]) -> Outgoing:
        """Order the rows of x (T, D) by expert, and plan the exchange of each of these consecutive chunks."""
        slots, x = TokenSlots.of(decision), x.to(compute_dtype(x))
        table, counts = self.gather_counts(slots.counts())
        order = order_by_expert(slots.expert_index, slots.num_experts, num_rows=sum(counts[self.group.index]))
        plans = [plan_exchange(table, counts, bounds, self.group.index) for bounds in chunks]
        return Outgoing(
            order=order, rows=gather_rows(x, order), weight=order.of_rows(slots.weight)[:, None], plans=plans
        )

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

    def start_rows(self, rows: Tensor, weight: Tensor, plan: ExchangePlan) -> "RowExchange":
        """Start to send rows (R, D) and their combine weights (R, 1)."""
        return RowExchange(rows=self.start(rows, plan.sizes), weight=self.depart(weight, plan.sizes), plan=plan)

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


@dataclass(frozen=True, slots=True)
class RowExchange:
    """Rows and their combine weights under way to their experts."""

    rows: AllToAll
    weight: AllToAll
    plan: ExchangePlan

    def dispatched(self, *, handle: Any, dtype: torch.dtype) -> Dispatched:
        """Wait for the rows, and return them in `dtype` with their experts."""
        x, weight = self.rows.wait().to(dtype), self.weight.wait()
        return Dispatched(x=x, expert_index=self.plan.expert_index, weight=weight, num_rows=len(x), handle=handle)
