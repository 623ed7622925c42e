"""Dispatcher interface: moves rows to the experts and back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.moe.dispatch.order import ExpertOrder
from trainer.moe.routing import RoutingDecision
from trainer.step_timer import StepTimer

# T tokens, k slots, R rows here, E_local experts here, D d_model.


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """Rows where their experts are."""

    x: Tensor
    """(R, D) grouped by expert, ascending."""
    rows_per_expert: Tensor
    """(E_local,) int64, sums to R."""
    handle: Any
    """Opaque; only the dispatcher that made it reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """Expert outputs on each token's source rank."""

    y: Tensor
    """(T, D): each token's rows, weighted and summed in list order; a token without experts has 0."""
    rows: Tensor
    """(R, D) in expert order."""
    order: ExpertOrder

    @classmethod
    def of(cls, rows: Tensor, order: ExpertOrder, *, is_compiled: bool) -> "Combined":
        """Sum rows (R, D), compiled where it can be."""
        return cls(y=order.combine(rows, is_compiled=is_compiled), rows=rows, order=order)

    def expert_similarity(self) -> Tensor:
        """Return (T,): how much the outputs of a token's experts are alike, the mean squared cosine of their pairs.

        1: they are multiples of each other. 0: they are orthogonal, or there are fewer than two.
        """
        slots = self.order.row_of_slot  # (T, k)
        rows = torch.cat([self.rows, self.rows.new_zeros(1, self.rows.shape[1])])
        wide = torch.promote_types(rows.dtype, torch.float32)
        unit = F.normalize(rows.to(wide)[slots], dim=-1)  # (T, k, D); an empty slot is 0
        with torch.autocast(rows.device.type, enabled=False):  # a mean of 1 / D would vanish in bfloat16
            squared = (unit @ unit.mT).square()  # (T, k, k)
        has_row = (slots < len(self.rows)).sum(-1)  # (T,)
        others = ~torch.eye(slots.shape[1], dtype=torch.bool, device=slots.device)
        return (squared * others).sum((1, 2)) / (has_row * (has_row - 1)).clamp(min=1)


class RunExperts(Protocol):
    """Computes rows with all local experts, or with those in the range `part`."""

    def __call__(self, x: Tensor, rows_per_expert: Tensor, part: tuple[int, int] | None = None) -> Tensor:
        """Return (R, D) for rows (R, D) grouped by expert."""
        ...


class Dispatcher(ABC):
    """Moves rows to experts and back. Knows ranks; knows nothing of gating. Holds no parameters."""

    is_compiled: bool = False
    """Compile what surrounds the sending, where it can be."""
    step_timer: StepTimer = StepTimer()
    """Measures the three parts of `forward` once it is started; `parallelize` sets the run's."""

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Combined:
        """Return the experts' outputs for x (T, D), row by row and combined."""
        with self.step_timer.within("dispatch"):
            sent = self.dispatch(x, decision)
        with self.step_timer.within("experts"):
            y = experts(sent.x, sent.rows_per_expert)
        with self.step_timer.within("combine"):
            return self.combine(y, sent)

    @abstractmethod
    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send each kept assignment's row of x (T, D) to its expert."""

    @abstractmethod
    def combine(self, y: Tensor, dispatched: Dispatched) -> Combined:
        """Return the rows y (R, D) to the ranks of their tokens, and sum each token's."""
