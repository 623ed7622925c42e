"""Rows travel in buffers of a fixed size, so that no rank waits for a size."""

import torch
from torch import Tensor

from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Sent
from trainer.moe.dispatch.base import Dispatched
from trainer.moe.dispatch.order import ExchangePlan, pad_to_capacity
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import gather_rows, permute


class PaddedAllToAllDispatcher(AllToAllDispatcher):
    """Sends as many rows for every expert as its capacity, empty ones included: no sizes to agree on or to wait for."""

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send each kept assignment's row to its expert, and empty rows up to the capacity."""
        if decision.capacity is None:  # a dropless evaluation: sizes are whatever they are
            return super().dispatch(x, decision)
        order = pad_to_capacity(decision)
        capacity, size = decision.capacity, self.group.size
        send = [(end - first) * capacity for first, end in self.bounds]  # the same from every rank
        first, end = self.bounds[self.group.index]
        here = end - first
        # Arrival order is (sender, expert, place); expert order is (expert, sender, place).
        arrival = torch.arange(size * here * capacity, device=x.device).view(size, here, capacity)
        plan = ExchangePlan(
            sizes=[send] * size,
            order=arrival.transpose(0, 1).reshape(-1),
            rows_per_expert=torch.full((here,), size * capacity, device=x.device),
        )
        # What empty rows are copied from: a token of zeros, which has no slots and so gets no gradient.
        slots = order.row_of_slot
        no_slots = slots.new_full((1, slots.shape[1]), len(order.token_of_row))
        rows = gather_rows(torch.cat([x, x.new_zeros(1, x.shape[1])]), order.token_of_row, torch.cat([slots, no_slots]))
        arrived = permute(self.send(rows, plan.sizes), plan.order)
        return Dispatched(x=arrived, rows_per_expert=plan.rows_per_expert, handle=Sent(order, plan))
