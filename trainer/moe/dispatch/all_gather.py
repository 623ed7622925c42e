"""All-gather dispatcher: every rank gets every token. Reference for the dispatchers that send only what is needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll
from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Bounds
from trainer.moe.dispatch.base import Dispatched, RunExperts
from trainer.moe.dispatch.exchange_plan import ExchangePlan, plan_exchange
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.expert_order import ExpertOrder, order_by_expert
from trainer.ops.permute import sum_rows

# T tokens, R rows here, E experts, G ranks of the expert-parallel group, D d_model.


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Tokens of all ranks, and the token of each of their rows."""

    order: ExpertOrder
    """Order of this rank's rows."""
    table: Tensor
    """(G, E) rows of each rank for each expert."""
    counts: list[list[int]]
    """The same on the host."""
    tokens: Tensor
    """(all T, D)."""
    rows: Sequence[tuple[Tensor, Tensor]]
    """For each rank, the index in `tokens` of each of its rows (R, 1), and their combine weights, in expert order."""


class AllGatherDispatcher(AllToAllDispatcher):
    """Sends every token to every rank, which selects the rows of its experts. Simplest to verify; for few ranks."""

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Gather all ranks' tokens and select the rows of the local experts."""
        gathered = self._gather(x, decision)
        plan, sent = self._pick(gathered, self.bounds)
        return replace(sent, handle=(gathered.order, plan))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Gather all experts' rows, select those of this rank's tokens and sum them."""
        order, plan = dispatched.handle
        rows = self._mine(self._start_back(y, plan).wait().to(y.dtype), plan)
        return sum_rows(rows, order, dtype=torch.promote_types(y.dtype, dispatched.weight.dtype))

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Tensor:
        """Dispatch, compute and combine chunk by chunk; outputs of one chunk are sent while another is computed."""
        if len(self.chunks.bounds) == 1:
            return super().forward(x, decision, experts)
        within = self.step_timer.within
        with within("dispatch"):
            gathered = self._gather(x, self.chunks.renumbered(decision))
        back = []
        for bounds, part in zip(self.chunks.bounds, self.chunks.of_rank[self.group.index], strict=True):
            with within("dispatch"):
                plan, here = self._pick(gathered, bounds)
            with within("experts"):
                y = experts(here.x, here.expert_index, here.weight, num_rows=here.num_rows, part=part)
            with within("combine"):
                back.append((self._start_back(y, plan), plan))
        with within("combine"):
            rows = torch.cat([self._mine(exchange.wait(), plan) for exchange, plan in back])
            return sum_rows(rows, gathered.order, dtype=torch.promote_types(x.dtype, decision.combine_weight.dtype))

    def _gather(self, x: Tensor, decision: RoutingDecision) -> _Gathered:
        slots, x = TokenSlots.of(decision), x.to(compute_dtype(x))
        rows_per_expert = slots.counts()
        num_tokens = rows_per_expert.new_full((1,), len(x))
        table, counts = self.gather_counts(torch.cat([rows_per_expert, num_tokens]))  # (G, E + 1)
        num_rows = sum(counts[self.group.index][:-1])
        order = order_by_expert(slots.expert_index, slots.num_experts, num_rows=num_rows)
        tokens_of, rows_of = [row[-1] for row in counts], [sum(row[:-1]) for row in counts]
        tokens = self._to_all(self.start, x, tokens_of).to(x.dtype)
        first = sum(tokens_of[: self.group.index])
        token_of_row = self._to_all(self.depart, order.token_of_row[:, None] + first, rows_of).split(rows_of)
        weight = self._to_all(self.depart, order.of_rows(slots.weight)[:, None], rows_of).split(rows_of)
        return _Gathered(
            order=order, table=table, counts=counts, tokens=tokens, rows=list(zip(token_of_row, weight, strict=True))
        )

    def _pick(self, gathered: _Gathered, bounds: Bounds) -> tuple[ExchangePlan, Dispatched]:
        """Return the rows of the experts within this rank's bounds."""
        plan = plan_exchange(gathered.table, gathered.counts, bounds, self.group.index)
        first, end = bounds[self.group.index]
        picked, weight = [], []
        for (token_of_row, weight_of_row), counts in zip(gathered.rows, gathered.counts, strict=True):
            mine = slice(sum(counts[:first]), sum(counts[:end]))
            picked.append(token_of_row[mine, 0])
            weight.append(weight_of_row[mine])
        x = gathered.tokens.index_select(0, torch.cat(picked))
        return plan, Dispatched(
            x=x, expert_index=plan.expert_index, weight=torch.cat(weight), num_rows=len(x), handle=None
        )

    def _start_back(self, y: Tensor, plan: ExchangePlan) -> AllToAll:
        """Start sending this rank's rows to all ranks; they arrive ordered by rank, then by the rank of their token."""
        return self._start_to_all(self.start, y, self._rows_at(plan))

    def _mine(self, rows: Tensor, plan: ExchangePlan) -> Tensor:
        """Return the rows of this rank's tokens, given those of all ranks."""
        sizes, me = plan.sizes, self.group.index
        starts = [sum(row[rank] for row in sizes[:me]) for rank in range(self.group.size)]
        parts = zip(rows.split(self._rows_at(plan)), starts, sizes[me], strict=True)
        return torch.cat([part[start : start + size] for part, start, size in parts])

    def _rows_at(self, plan: ExchangePlan) -> list[int]:
        return [sum(row[rank] for row in plan.sizes) for rank in range(self.group.size)]

    def _to_all(self, start: Callable[..., AllToAll], x: Tensor, rows: Sequence[int]) -> Tensor:
        return self._start_to_all(start, x, rows).wait()

    def _start_to_all(self, start: Callable[..., AllToAll], x: Tensor, rows: Sequence[int]) -> AllToAll:
        """Start the concatenation of all ranks' x; its gradient is the sum over ranks, in rank order."""
        copies = x.repeat(self.group.size, *(1 for _ in x.shape[1:]))
        return start(copies, [[n] * self.group.size for n in rows])
