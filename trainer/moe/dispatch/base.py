"""What a dispatcher is: it moves rows to the experts and back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trainer.moe.routing import RoutingDecision
from trainer.stopwatch import Stopwatch

# T tokens, R rows here, E_local experts here, D d_model.


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """Rows where their experts are."""

    x: Tensor
    """(R, D) grouped by expert, ascending."""
    rows_per_expert: Tensor
    """(E_local,) int64, sums to R."""
    handle: Any
    """Opaque; only the dispatcher that made it reads it."""


class RunExperts(Protocol):
    """What computes rows: all experts that are here, or those from the first to the last of `part`."""

    def __call__(self, x: Tensor, rows_per_expert: Tensor, part: tuple[int, int] | None = None) -> Tensor:
        """Return (R, D) for rows (R, D) grouped by expert."""
        ...


class Dispatcher(ABC):
    """Moves rows to experts and back. Knows ranks; knows nothing of gating. Holds no parameters."""

    is_compiled: bool = False
    """Compile what surrounds the sending, where it can be."""
    stopwatch: Stopwatch = Stopwatch()
    """Measures the three parts of `run`, if somebody starts it; `parallelize` gives the run's."""

    def run(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Tensor:
        """Return (T, D): what the experts make of x (T, D), weighted and summed."""
        with self.stopwatch.within("dispatch"):
            sent = self.dispatch(x, decision)
        with self.stopwatch.within("experts"):
            y = experts(sent.x, sent.rows_per_expert)
        with self.stopwatch.within("combine"):
            return self.combine(y, sent)

    @abstractmethod
    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send each kept assignment's row of x (T, D) to its expert."""

    @abstractmethod
    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring y (R, D) back as (T, D): weighted, summed in list order; a token without experts gets 0."""
