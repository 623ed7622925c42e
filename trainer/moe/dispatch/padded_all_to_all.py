"""All-to-all with buffers of static size, so that no sizes have to be exchanged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Bounds
from trainer.moe.dispatch.order import ExchangePlan, ExpertOrder, pad_to_capacity
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import gather_rows


class PaddedAllToAllDispatcher(AllToAllDispatcher):
    """Pads the rows of every expert to its capacity: sizes are static, so nothing waits for them."""

    def prepare(
        self, x: Tensor, decision: RoutingDecision, chunks: Sequence[Bounds]
    ) -> tuple[ExpertOrder, Tensor, list[ExchangePlan]]:
        """Order the rows of x (T, D) by expert, padded to the capacity, and plan the exchange of each chunk."""
        if decision.capacity is None:  # dropless evaluation: sizes are dynamic
            return super().prepare(x, decision, chunks)
        order = pad_to_capacity(decision)
        # Empty rows are copies of an additional token of zeros, which has no slots and so no gradient.
        slots = order.row_of_slot
        no_slots = slots.new_full((1, slots.shape[1]), len(order.token_of_row))
        rows = gather_rows(torch.cat([x, x.new_zeros(1, x.shape[1])]), order.token_of_row, torch.cat([slots, no_slots]))
        return order, rows, [self._plan(bounds, decision.capacity, x.device) for bounds in chunks]

    def _plan(self, bounds: Bounds, capacity: int, device: torch.device) -> ExchangePlan:
        size = self.group.size
        send = [(end - first) * capacity for first, end in bounds]  # the same on every rank
        first, end = bounds[self.group.index]
        here = end - first
        # Arrival order is (sender, expert, row); expert order is (expert, sender, row).
        arrival = torch.arange(size * here * capacity, device=device).view(size, here, capacity)
        return ExchangePlan(
            sizes=[send] * size,
            order=arrival.transpose(0, 1).reshape(-1),
            rows_per_expert=torch.full((here,), size * capacity, device=device),
        )
