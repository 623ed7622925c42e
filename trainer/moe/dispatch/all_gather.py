"""All-gather dispatcher: every rank gets every token. Reference for the dispatchers that send only what is needed."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll, Group
from trainer.moe.dispatch.base import Dispatched, RunExperts
from trainer.moe.dispatch.chunks import Chunks
from trainer.moe.dispatch.exchange_plan import ExchangePlan, plan_exchange
from trainer.moe.dispatch.exchanging import ExchangingDispatcher, Wire
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.expert_order import ExpertOrder, order_by_expert
from trainer.ops.permute import sum_rows

# T tokens, R rows here, E experts, G ranks of the expert-parallel group, D d_model.


class _Gathering(NamedTuple):
    """Tokens of all ranks under way, and the token of each of their rows."""

    order: ExpertOrder
    """Order of this rank's rows."""
    table: Tensor
    """(G, E) rows of each rank for each expert."""
    counts: list[list[int]]
    """The same on the host."""
    tokens: AllToAll
    """(all T, D)."""
    token_of_row: AllToAll
    """(all R, 1) index in `tokens` of each row, rank by rank, in expert order."""
    weight: AllToAll
    """(all R, 1) their combine weights."""
    dtype: torch.dtype
    """Dtype of the rows."""
    dtype_of_sum: torch.dtype


class _Returning(NamedTuple):
    """Outputs of all ranks' rows under way, chunk by chunk."""

    order: ExpertOrder
    exchanges: Sequence[tuple[AllToAll, ExchangePlan]]
    dtype: torch.dtype
    dtype_of_sum: torch.dtype


class AllGatherDispatcher(ExchangingDispatcher):
    """Sends every token to every rank, which selects the rows of its experts. Simplest to verify; for few ranks."""

    def __init__(self, group: Group, num_experts: int, wire: Wire = "compute", num_chunks: int = 1) -> None:
        super().__init__(group, num_experts, wire)
        self.chunks = Chunks.of(self.bounds, num_chunks)

    def begin(self, x: Tensor, decision: RoutingDecision) -> _Gathering:
        """Start to gather all ranks' tokens."""
        with self.step_timer.within("dispatch"):
            return self._gather(x, self.chunks.renumbered(decision) if len(self.chunks.bounds) > 1 else decision)

    def compute(self, begun: _Gathering, experts: RunExperts) -> _Returning:
        """Select, compute and start to send to all, chunk by chunk."""
        within, back = self.step_timer.within, []
        with within("dispatch"):
            tokens, rows = begun.tokens.wait().to(begun.dtype), [sum(row[:-1]) for row in begun.counts]
            token_of_row, weight = begun.token_of_row.wait().split(rows), begun.weight.wait().split(rows)
            arrived = list(zip(token_of_row, weight, strict=True))
        for bounds, part in zip(self.chunks.bounds, self.chunks.of_rank[self.group.index], strict=True):
            with within("dispatch"):
                plan = plan_exchange(begun.table, begun.counts, bounds, self.group.index)
                here = self._pick(plan, tokens, arrived, begun.counts, bounds[self.group.index])
            y = self.apply(here, experts, part if len(self.chunks.bounds) > 1 else None)
            with within("combine"):
                back.append((self._start_to_all(self.start, y, self._rows_at(plan)), plan))
        return _Returning(begun.order, back, begun.dtype, begun.dtype_of_sum)

    def finish(self, computed: _Returning) -> Tensor:
        """Select the rows of this rank's tokens and sum them."""
        with self.step_timer.within("combine"):
            parts = [self._mine(exchange.wait().to(computed.dtype), plan) for exchange, plan in computed.exchanges]
            return sum_rows(torch.cat(parts), computed.order, dtype=computed.dtype_of_sum)

    def _gather(self, x: Tensor, decision: RoutingDecision) -> _Gathering:
        slots, x = TokenSlots.of(decision), x.to(compute_dtype(x))
        rows_per_expert = slots.counts()
        num_tokens = rows_per_expert.new_full((1,), len(x))
        table, counts = self.gather_counts(torch.cat([rows_per_expert, num_tokens]))  # (G, E + 1)
        num_rows = sum(counts[self.group.index][:-1])
        order = order_by_expert(slots.expert_index, slots.num_experts, num_rows=num_rows)
        tokens_of, rows_of = [row[-1] for row in counts], [sum(row[:-1]) for row in counts]
        first = sum(tokens_of[: self.group.index])
        return _Gathering(
            order=order,
            table=table,
            counts=counts,
            tokens=self._start_to_all(self.start, x, tokens_of),
            token_of_row=self._start_to_all(self.depart, order.token_of_row[:, None] + first, rows_of),
            weight=self._start_to_all(self.depart, order.of_rows(slots.weight)[:, None], rows_of),
            dtype=x.dtype,
            dtype_of_sum=torch.promote_types(x.dtype, slots.weight.dtype),
        )

    def _pick(
        self,
        plan: ExchangePlan,
        tokens: Tensor,
        arrived: Sequence[tuple[Tensor, Tensor]],
        counts_of: Sequence[Sequence[int]],
        experts: tuple[int, int],
    ) -> Dispatched:
        """Return the rows of some of this rank's experts, given each rank's token of each row and its weight."""
        first, end = experts
        picked, weight = [], []
        for (token_of_row, weight_of_row), counts in zip(arrived, counts_of, strict=True):
            mine = slice(sum(counts[:first]), sum(counts[:end]))
            picked.append(token_of_row[mine, 0])
            weight.append(weight_of_row[mine])
        x = tokens.index_select(0, torch.cat(picked))
        return Dispatched(x=x, expert_index=plan.expert_index, weight=torch.cat(weight), num_rows=len(x))

    def _mine(self, rows: Tensor, plan: ExchangePlan) -> Tensor:
        """Return the rows of this rank's tokens, given those of all ranks."""
        sizes, me = plan.sizes, self.group.index
        starts = [sum(row[rank] for row in sizes[:me]) for rank in range(self.group.size)]
        parts = zip(rows.split(self._rows_at(plan)), starts, sizes[me], strict=True)
        return torch.cat([part[start : start + size] for part, start, size in parts])

    def _rows_at(self, plan: ExchangePlan) -> list[int]:
        return [sum(row[rank] for row in plan.sizes) for rank in range(self.group.size)]

    def _start_to_all(self, start: Callable[..., AllToAll], x: Tensor, rows: Sequence[int]) -> AllToAll:
        """Start the concatenation of all ranks' x; its gradient is the sum over ranks, in rank order."""
        copies = x.repeat(self.group.size, *(1 for _ in x.shape[1:]))
        return start(copies, [[n] * self.group.size for n in rows])
