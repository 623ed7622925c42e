"""What a dispatcher is: it moves rows to the experts and back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.moe.routing import RoutingDecision

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


class Dispatcher(ABC):
    """Moves rows to experts and back. Knows ranks; knows nothing of gating. Holds no parameters."""

    is_compiled: bool = False
    """Compile what surrounds the sending, where it can be."""

    @abstractmethod
    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send each kept assignment's row of x (T, D) to its expert."""

    @abstractmethod
    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring y (R, D) back as (T, D): weighted, summed in list order; a token without experts gets 0."""
