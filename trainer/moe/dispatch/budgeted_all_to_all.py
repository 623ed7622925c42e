"""All-to-all with receive buffers of a fixed share of all rows, so that nothing waits for sizes in training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Outgoing
from trainer.moe.dispatch.exchange_plan import ExchangePlan
from trainer.moe.dispatch.exchanging import Bounds, Wire
from trainer.moe.dispatch.row_budget import RowBudget
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.expert_order import ExpertOrder

# T tokens, k slots, E experts, G ranks of the expert-parallel group, P rows from each rank to each rank.


class BudgetedAllToAllDispatcher(RowBudget, AllToAllDispatcher):
    """Sends P rows from every rank to every rank: `row_budget` times an even share of a rank's T * k assignments.

    Empty rows have weight 0. Rows beyond P do not travel.
    """

    def __init__(self, group: Group, num_experts: int, wire: Wire, row_budget: float) -> None:
        super().__init__(group, num_experts, wire)
        self.row_budget = row_budget

    def prepare(self, x: Tensor, decision: RoutingDecision, chunks: Sequence[Bounds]) -> Outgoing:
        """Order the rows of x (T, D) by expert, padded to P for each rank, and plan their exchange."""
        share = self.budget_of(decision)
        if share is None:
            return super().prepare(x, decision, chunks)
        slots, x = TokenSlots.of(decision), x.to(compute_dtype(x))
        num_slots, size = slots.expert_index.numel(), self.group.size
        budget = min(num_slots, -int(-share * num_slots // size))
        order, counts = self._order(slots, budget)
        table = self.group.all_gather(counts)  # (G, E), read by nobody here
        first, end = self.bounds[self.group.index]
        ends = table[:, first:end].cumsum(1)  # (G, E_local)
        place = torch.arange(budget, device=x.device).expand(size, budget).contiguous()
        expert = torch.searchsorted(ends, place, right=True).clamp(max=end - first - 1)  # empty rows join the last one
        plan = ExchangePlan(sizes=[[budget] * size] * size, expert_index=expert.view(-1, 1))
        return Outgoing.of(x, slots, order, [plan])

    def _order(self, slots: TokenSlots, budget: int) -> tuple[ExpertOrder, Tensor]:
        """Return the rows by receiver, then expert, with P for each receiver, and the (E,) assignments of experts."""
        counts, rank = slots.counts(), self.rank_of(slots.expert_index.reshape(-1))
        order, sent = slots.pad_queues(rank, self.group.size, budget, counts)
        self.add_overflow((sent - budget).clamp(min=0).sum())
        return order, counts
