"""All-to-all dispatcher with dynamic sizes, and its overlap of communication and computation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll, Group
from trainer.moe.dispatch.base import Dispatched, RunExperts
from trainer.moe.dispatch.chunks import Chunks
from trainer.moe.dispatch.exchange_plan import ExchangePlan, plan_exchange
from trainer.moe.dispatch.exchanging import Bounds, ExchangingDispatcher, Wire
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.expert_order import ExpertOrder, order_by_expert
from trainer.ops.permute import gather_rows, sum_rows

# T tokens, k slots, R rows here, E experts, G ranks of the expert-parallel group, D d_model.


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Rows of this rank's tokens, ready to be sent."""

    order: ExpertOrder
    rows: Tensor
    """(R, D)."""
    weight: Tensor
    """(R, 1) combine weights."""
    plans: Sequence[ExchangePlan]
    """Plan of each chunk."""

    @classmethod
    def of(cls, x: Tensor, slots: TokenSlots, order: ExpertOrder, plans: Sequence[ExchangePlan]) -> "Outgoing":
        """Copy the tokens x (T, D) and their combine weights into the order."""
        return cls(order=order, rows=gather_rows(x, order), weight=order.of_rows(slots.weight)[:, None], plans=plans)


class AllToAllDispatcher(ExchangingDispatcher):
    """Sends every row to the rank of its expert, dropless.

    The ranks all-gather their row counts per expert, and each derives all sizes from the same (G, E) table. Rows arrive
    ordered by sender, and senders are in the order of their tokens, so an expert sees its rows in the same order under
    every layout. It applies the combine weights, so rows only have to be summed when they are back.

    With several chunks, a rank's experts are split into as many parts, and the rows of one part are communicated while
    another part is computed; see `Chunks`. No sum changes, not even its order.
    """

    def __init__(self, group: Group, num_experts: int, wire: Wire = "compute", num_chunks: int = 1) -> None:
        super().__init__(group, num_experts, wire)
        self.chunks = Chunks.of(self.bounds, num_chunks)

    def begin(self, x: Tensor, decision: RoutingDecision) -> "Begun":
        """Start to send a row for each kept assignment, with its combine weight, to its expert."""
        chunks = self.chunks.bounds
        with self.step_timer.within("dispatch"):
            # Experts of one chunk keep their numbers.
            outgoing = self.prepare(x, self.chunks.renumbered(decision) if len(chunks) > 1 else decision, chunks)
            sent = [sum(plan.sizes[self.group.index]) for plan in outgoing.plans]
            parts = zip(outgoing.rows.split(sent), outgoing.weight.split(sent), outgoing.plans, strict=True)
            there = [self.start_rows(rows, weight, plan) for rows, weight, plan in parts]
            dtype = compute_dtype(x)
            wide = torch.promote_types(dtype, decision.combine_weight.dtype)
            return Begun(order=outgoing.order, exchanges=there, dtype=dtype, dtype_of_sum=wide)

    def compute(self, begun: "Begun", experts: RunExperts) -> "Returning":
        """Compute chunk by chunk, and start to send back."""
        within, back = self.step_timer.within, []
        for exchange, part in zip(begun.exchanges, self.chunks.of_rank[self.group.index], strict=True):
            with within("dispatch"):
                here = self.arrived(exchange, begun.dtype)
            y = self.apply(here, experts, part if len(begun.exchanges) > 1 else None)
            with within("combine"):
                back.append(self.start(y, exchange.plan.sizes_back))
        return Returning(order=begun.order, exchanges=back, dtype=begun.dtype, dtype_of_sum=begun.dtype_of_sum)

    def finish(self, computed: "Returning") -> Tensor:
        """Wait for the rows, and sum those of each token."""
        with self.step_timer.within("combine"):
            rows = [exchange.wait().to(computed.dtype) for exchange in computed.exchanges]
            whole = rows[0] if len(rows) == 1 else torch.cat(rows)
            return sum_rows(whole, computed.order, dtype=computed.dtype_of_sum)

    def arrived(self, exchange: "RowExchange", dtype: torch.dtype) -> Dispatched:
        """Wait for rows, and return them in `dtype` with their experts."""
        x, weight = exchange.rows.wait().to(dtype), exchange.weight.wait()
        return Dispatched(x=x, expert_index=exchange.plan.expert_index, weight=weight, num_rows=len(x))

    def prepare(self, x: Tensor, decision: RoutingDecision, chunks: Sequence[Bounds]) -> Outgoing:
        """Order the rows of x (T, D) by expert, and plan the exchange of each of these consecutive chunks."""
        slots, x = TokenSlots.of(decision), x.to(compute_dtype(x))
        table, counts = self.gather_counts(slots.counts())
        order = order_by_expert(slots.expert_index, slots.num_experts, num_rows=sum(counts[self.group.index]))
        plans = [plan_exchange(table, counts, bounds, self.group.index) for bounds in chunks]
        return Outgoing.of(x, slots, order, plans)

    def start_rows(self, rows: Tensor, weight: Tensor, plan: ExchangePlan) -> "RowExchange":
        """Start to send rows (R, D) and their combine weights (R, 1)."""
        return RowExchange(rows=self.start(rows, plan.sizes), weight=self.depart(weight, plan.sizes), plan=plan)


class RowExchange(NamedTuple):
    """Rows and their combine weights under way to their experts."""

    rows: AllToAll
    weight: AllToAll
    plan: ExchangePlan


class Begun(NamedTuple):
    """Rows under way to their experts, chunk by chunk."""

    order: ExpertOrder
    exchanges: Sequence[RowExchange]
    dtype: torch.dtype
    """Dtype of the rows."""
    dtype_of_sum: torch.dtype


class Returning(NamedTuple):
    """Outputs of the experts under way to their tokens, chunk by chunk."""

    order: ExpertOrder
    exchanges: Sequence[AllToAll]
    dtype: torch.dtype
    """Dtype of the rows."""
    dtype_of_sum: torch.dtype
