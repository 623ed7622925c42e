"""Dispatcher for a single rank, where nothing is sent."""

from torch import Tensor

from trainer.moe.dispatch.base import Dispatched, Dispatcher
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision


class LocalDispatcher(Dispatcher):
    """All experts are local: they get the tokens as they are."""

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Return the tokens."""
        slots = TokenSlots.of(decision)
        return Dispatched(
            x=x, expert_index=slots.expert_index, weight=slots.weight, num_rows=slots.num_rows, handle=None
        )

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Return the sums."""
        return y
