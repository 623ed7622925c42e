"""Dispatcher interface: sends token rows to their experts and combines the outputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.moe.dispatch.order import ExpertOrder
from trainer.moe.routing import RoutingDecision
from trainer.step_timer import StepTimer

# T tokens, k slots, R rows here, E_local experts here, D d_model.


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """Rows on the ranks of their experts."""

    x: Tensor
    """(R, D) grouped by expert, ascending."""
    rows_per_expert: Tensor
    """(E_local,) int64, sums to R."""
    handle: Any
    """Opaque state that the same dispatcher needs in `combine`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """Expert outputs on each token's source rank."""

    y: Tensor
    """(T, D) weighted sum of each token's rows, in assignment order; 0 for a token without experts."""
    rows: Tensor
    """(R, D) in expert order."""
    order: ExpertOrder

    @classmethod
    def of(cls, rows: Tensor, order: ExpertOrder, *, is_compiled: bool) -> "Combined":
        """Combine rows (R, D), given in expert order."""
        return cls(y=order.combine(rows, is_compiled=is_compiled), rows=rows, order=order)

    def expert_similarity(self) -> Tensor:
        """Return (T,): the mean squared cosine between the outputs of each pair of a token's experts.

        1 if they are parallel; 0 if they are orthogonal or there are fewer than two.
        """
        slots = self.order.row_of_slot  # (T, k)
        rows = torch.cat([self.rows, self.rows.new_zeros(1, self.rows.shape[1])])
        wide = torch.promote_types(rows.dtype, torch.float32)
        unit = F.normalize(rows.to(wide)[slots], dim=-1)  # (T, k, D); 0 in empty slots
        with torch.autocast(rows.device.type, enabled=False):  # a mean of 1 / D would vanish in bfloat16
            squared = (unit @ unit.mT).square()  # (T, k, k)
        has_row = (slots < len(self.rows)).sum(-1)  # (T,)
        others = ~torch.eye(slots.shape[1], dtype=torch.bool, device=slots.device)
        return (squared * others).sum((1, 2)) / (has_row * (has_row - 1)).clamp(min=1)


RunExperts = Callable[..., Tensor]
"""`Experts.forward`: rows (R, D) grouped by expert, rows_per_expert and optionally `part` -> (R, D)."""


class Dispatcher(ABC):
    """Sends rows to experts and back. Depends on ranks, not on routing; has no parameters."""

    is_compiled: bool = False
    """Use compiled kernels around the communication."""
    step_timer: StepTimer = StepTimer()
    """Measures the three parts of `forward`, once started; `parallelize` sets that of the run."""

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Combined:
        """Dispatch x (T, D), apply the experts and combine their outputs."""
        with self.step_timer.within("dispatch"):
            sent = self.dispatch(x, decision)
        with self.step_timer.within("experts"):
            y = experts(sent.x, sent.rows_per_expert)
        with self.step_timer.within("combine"):
            return self.combine(y, sent)

    @abstractmethod
    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send the row of each kept assignment of x (T, D) to its expert."""

    @abstractmethod
    def combine(self, y: Tensor, dispatched: Dispatched) -> Combined:
        """Send the outputs y (R, D) back to the ranks of their tokens, and sum those of each token."""
