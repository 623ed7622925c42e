"""Dispatcher for a single rank, where rows are only reordered."""

from torch import Tensor

from trainer.moe.dispatch.base import Combined, Dispatched, Dispatcher
from trainer.moe.dispatch.order import group_by_expert
from trainer.moe.routing import RoutingDecision


class LocalDispatcher(Dispatcher):
    """Groups rows by expert; all experts are local, so nothing is sent."""

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Copy the row of each kept assignment into expert order."""
        order = group_by_expert(decision)
        return Dispatched(x=order.gather(x), rows_per_expert=order.rows_per_expert, handle=order)

    def combine(self, y: Tensor, dispatched: Dispatched) -> Combined:
        """Sum the rows of each token."""
        return Combined.of(y, dispatched.handle, is_compiled=self.is_compiled)
