"""Dispatcher for a single rank, where nothing is sent."""

from torch import Tensor

from trainer.moe.dispatch.base import Dispatched, Dispatcher, RunExperts
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision


class LocalDispatcher(Dispatcher):
    """All experts are local: they get the tokens as they are."""

    def begin(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Return the tokens."""
        with self.step_timer.within("dispatch"):
            slots = TokenSlots.of(decision)
            return Dispatched(x=x, expert_index=slots.expert_index, weight=slots.weight, num_rows=slots.num_rows)

    def compute(self, begun: Dispatched, experts: RunExperts) -> Tensor:
        """Return the sums, which the experts make."""
        return self.apply(begun, experts)

    def finish(self, computed: Tensor) -> Tensor:
        """Return the sums."""
        return computed
