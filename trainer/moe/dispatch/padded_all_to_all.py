"""All-to-all with buffers of static size, so that no sizes have to be exchanged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Outgoing
from trainer.moe.dispatch.exchange_plan import ExchangePlan
from trainer.moe.dispatch.exchanging import Bounds
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.compute_dtype import compute_dtype


class PaddedAllToAllDispatcher(AllToAllDispatcher):
    """Pads the rows of every expert to its capacity: sizes are static, so nothing waits for them.

    Empty rows have weight 0.
    """

    def prepare(self, x: Tensor, decision: RoutingDecision, chunks: Sequence[Bounds]) -> Outgoing:
        """Order the rows of x (T, D) by expert, padded to the capacity, and plan the exchange of each chunk."""
        if decision.capacity is None:  # dropless evaluation: sizes are dynamic
            return super().prepare(x, decision, chunks)
        slots, x = TokenSlots.of(decision), x.to(compute_dtype(x))
        order = slots.pad_to_capacity(decision.capacity)
        plans = [self._plan(bounds, decision.capacity, x.device) for bounds in chunks]
        return Outgoing.of(x, slots, order, plans)

    def _plan(self, bounds: Bounds, capacity: int, device: torch.device) -> ExchangePlan:
        size = self.group.size
        send = [(end - first) * capacity for first, end in bounds]  # the same on every rank
        first, end = bounds[self.group.index]
        # Arrival order is (sender, expert, row).
        expert = torch.arange(end - first, device=device)[None, :, None].expand(size, -1, capacity)
        return ExchangePlan(sizes=[send] * size, expert_index=expert.reshape(-1, 1))
