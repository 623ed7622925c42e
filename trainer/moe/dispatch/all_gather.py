"""All-gather dispatcher: every rank gets every token. Reference for the dispatchers that send only what is needed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll
from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Bounds
from trainer.moe.dispatch.base import Combined, Dispatched, RunExperts
from trainer.moe.dispatch.order import ExchangePlan, ExpertOrder, group_by_expert, plan_exchange
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import permute_rows, unpermute_rows

# T tokens, R rows here, E experts, G ranks of the expert-parallel group, D d_model.


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Tokens of all ranks, and the token of each of their rows."""

    order: ExpertOrder
    """Order of this rank's rows."""
    counts: Tensor
    """(G, E) rows of each rank for each expert."""
    tokens: Tensor
    """(all T, D)."""
    token_of_row: Sequence[Tensor]
    """For each rank, the index in `tokens` of each of its rows, in expert order."""


class AllGatherDispatcher(AllToAllDispatcher):
    """Sends every token to every rank, which selects the rows of its experts. Simplest to verify; for few ranks."""

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Gather all ranks' tokens and select the rows of the local experts."""
        gathered = self._gather(x, decision)
        arrived, plan = self._pick(gathered, self.bounds)
        return Dispatched(x=arrived, rows_per_expert=plan.rows_per_expert, handle=(gathered.order, plan))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Combined:
        """Gather all experts' rows, select those of this rank's tokens and sum them."""
        order, plan = dispatched.handle
        rows = self._mine(self._start_back(y, plan).wait().to(y.dtype), plan)
        return Combined.of(rows, order, is_compiled=self.is_compiled)

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Combined:
        """Dispatch, compute and combine chunk by chunk; outputs of one chunk are sent while another is computed."""
        if len(self.chunks.bounds) == 1:
            return super().forward(x, decision, experts)
        within = self.step_timer.within
        with within("dispatch"):
            gathered = self._gather(x, self.chunks.renumbered(decision))
        back = []
        for bounds, part in zip(self.chunks.bounds, self.chunks.of_rank[self.group.index], strict=True):
            with within("dispatch"):
                arrived, plan = self._pick(gathered, bounds)
            with within("experts"):
                y = experts(arrived, plan.rows_per_expert, part)
            with within("combine"):
                back.append((self._start_back(y, plan), plan))
        with within("combine"):
            rows = torch.cat([self._mine(exchange.wait().to(x.dtype), plan) for exchange, plan in back])
            return Combined.of(rows, gathered.order, is_compiled=self.is_compiled)

    def _gather(self, x: Tensor, decision: RoutingDecision) -> _Gathered:
        order = group_by_expert(decision)
        counts = self.group.all_gather(order.rows_per_expert)
        self.check(counts, order)
        rows_of = counts.sum(1).tolist()
        tokens_of = self.group.all_gather(torch.tensor([len(x)], device=x.device)).flatten().tolist()
        tokens = self._start_to_all(x, tokens_of).wait().to(x.dtype)
        numbers = self._start_to_all(order.token_of_row[:, None], rows_of).wait().flatten().split(rows_of)
        firsts = [sum(tokens_of[:rank]) for rank in range(self.group.size)]
        token_of_row = [number + first for number, first in zip(numbers, firsts, strict=True)]
        return _Gathered(order, counts, tokens, token_of_row)

    def _pick(self, gathered: _Gathered, bounds: Bounds) -> tuple[Tensor, ExchangePlan]:
        """Return the rows of the experts within this rank's bounds, in expert order."""
        counts = gathered.counts
        plan = plan_exchange(counts, bounds, self.group.index)
        first, end = bounds[self.group.index]
        before, until = counts[:, :first].sum(1).tolist(), counts[:, :end].sum(1).tolist()
        by_rank = zip(gathered.token_of_row, before, until, strict=True)
        picked = torch.cat([tokens[b:u] for tokens, b, u in by_rank])
        return permute_rows(gathered.tokens.index_select(0, picked), plan.order), plan

    def _start_back(self, y: Tensor, plan: ExchangePlan) -> AllToAll:
        """Start sending this rank's rows to all ranks; they arrive ordered by rank, then by the rank of their token."""
        return self._start_to_all(unpermute_rows(y, plan.order), self._rows_at(plan))

    def _mine(self, rows: Tensor, plan: ExchangePlan) -> Tensor:
        """Return the rows of this rank's tokens, given those of all ranks."""
        sizes, me = plan.sizes, self.group.index
        starts = [sum(row[rank] for row in sizes[:me]) for rank in range(self.group.size)]
        parts = zip(rows.split(self._rows_at(plan)), starts, sizes[me], strict=True)
        return torch.cat([part[start : start + size] for part, start, size in parts])

    def _rows_at(self, plan: ExchangePlan) -> list[int]:
        return [sum(row[rank] for row in plan.sizes) for rank in range(self.group.size)]

    def _start_to_all(self, x: Tensor, rows: Sequence[int]) -> AllToAll:
        """Start the concatenation of all ranks' x; its gradient is the sum over ranks, in rank order."""
        copies = x.repeat(self.group.size, *(1 for _ in x.shape[1:]))
        sizes = [[n] * self.group.size for n in rows]
        return self.start(copies, sizes) if x.is_floating_point() else self.depart(copies, sizes)
