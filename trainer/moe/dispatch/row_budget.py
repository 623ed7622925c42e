"""Receive buffers of a fixed share of all rows, so that nothing waits for sizes in training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from trainer.moe.routing import RoutingDecision


class RowBudget:
    """Part of a dispatcher that has static sizes in training: `row_budget` times an even share of all rows.

    If rows find no place, they are counted in `overflow`: whoever reads it takes the step again without a budget, so
    that the result is the same in any case. Only passes inside of `static_sizes`, with a fixed number of experts per
    token, have a budget; all ranks have equally many tokens there.
    """

    row_budget: float | None = None
    has_static_sizes = False
    overflow: Tensor | None = None
    """Rows that found no place since the sizes became static."""

    @contextmanager
    def static_sizes(self) -> Iterator[None]:
        """Use static sizes inside of a block, and count the overflow anew."""
        self.has_static_sizes, self.overflow = True, None
        try:
            yield
        finally:
            self.has_static_sizes = False

    def budget_of(self, decision: RoutingDecision) -> float | None:
        """Return the budget that a pass has; None: its sizes are exact."""
        return self.row_budget if self.has_static_sizes and decision.top_k is not None else None

    def add_overflow(self, num_rows: Tensor) -> None:
        """Count rows without a place."""
        self.overflow = num_rows if self.overflow is None else self.overflow + num_rows
