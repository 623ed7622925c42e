"""Rows travel in buffers of a fixed size, so that no rank waits for a size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Bounds
from trainer.moe.dispatch.order import ExchangePlan, ExpertOrder, pad_to_capacity
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import gather_rows


class PaddedAllToAllDispatcher(AllToAllDispatcher):
    """Sends as many rows for every expert as its capacity, empty ones included: no sizes to agree on or to wait for."""

    def prepare(
        self, x: Tensor, decision: RoutingDecision, cuts: Sequence[Bounds]
    ) -> tuple[ExpertOrder, Tensor, list[ExchangePlan]]:
        """Order the rows of x (T, D) by expert, empty ones up to the capacity, and plan an exchange for each cut."""
        if decision.capacity is None:  # a dropless evaluation: sizes are whatever they are
            return super().prepare(x, decision, cuts)
        order = pad_to_capacity(decision)
        # What empty rows are copied from: a token of zeros, which has no slots and so gets no gradient.
        slots = order.row_of_slot
        no_slots = slots.new_full((1, slots.shape[1]), len(order.token_of_row))
        rows = gather_rows(torch.cat([x, x.new_zeros(1, x.shape[1])]), order.token_of_row, torch.cat([slots, no_slots]))
        return order, rows, [self._plan(bounds, decision.capacity, x.device) for bounds in cuts]

    def _plan(self, bounds: Bounds, capacity: int, device: torch.device) -> ExchangePlan:
        size = self.group.size
        send = [(end - first) * capacity for first, end in bounds]  # the same from every rank
        first, end = bounds[self.group.index]
        here = end - first
        # Arrival order is (sender, expert, place); expert order is (expert, sender, place).
        arrival = torch.arange(size * here * capacity, device=device).view(size, here, capacity)
        return ExchangePlan(
            sizes=[send] * size,
            order=arrival.transpose(0, 1).reshape(-1),
            rows_per_expert=torch.full((here,), size * capacity, device=device),
        )
