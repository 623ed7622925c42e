"""Dispatcher interface: sends tokens to their experts and combines the outputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.moe.routing import RoutingDecision
from trainer.step_timer import StepTimer

# T tokens here, N tokens or copies of tokens on the rank of their experts, k slots, D d_model.


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """Tokens on the ranks of their experts: the arguments of `Experts.forward`."""

    x: Tensor
    """(N, D)."""
    expert_index: Tensor
    """(N, k) int64 local expert; the number of local experts, or more, for none."""
    weight: Tensor
    """(N, k) combine weights."""
    num_rows: int | None
    """Number of entries of `expert_index` that are experts; None if only the device knows it."""


RunExperts = Callable[..., Tensor]
"""`Experts.forward`: (x, expert_index, weight, num_rows=, part=) -> (N, D) weighted sums."""
LendExperts = Callable[[nn.Module], Callable[[], Mapping[str, Tensor]]]
"""`ExpertCopies.start`: sends weights of experts to other ranks; what it returns waits for theirs."""


class Dispatcher(ABC):
    """Sends tokens to experts and their outputs back. Depends on ranks, not on routing; has no parameters."""

    step_timer: StepTimer = StepTimer()
    """Measures the three parts of `forward`, once started; `parallelize` sets that of the run."""

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Tensor:
        """Return (T, D): the weighted sum of the outputs of each token's experts, in slot order.

        It is in the wider dtype of x (T, D) and the combine weights; 0 for a token without experts.
        """
        y = self.finish(self.begin(x, decision), experts)
        return y.to(torch.promote_types(x.dtype, decision.combine_weight.dtype))

    @abstractmethod
    def begin(self, x: Tensor, decision: RoutingDecision) -> Any:
        """Start to send each kept assignment of x (T, D) to its expert; the result is for `finish`.

        What is computed before `finish`, such as shared experts, overlaps with the communication, also backward.
        """

    @abstractmethod
    def finish(self, begun: Any, experts: RunExperts) -> Tensor:
        """Apply the experts to what has arrived, send their outputs back and return the sum of each token's (T, D)."""

    def apply(self, sent: Dispatched, experts: RunExperts, part: tuple[int, int] | None = None) -> Tensor:
        """Apply the experts here, or those in `part`, to tokens: (N, D)."""
        with self.step_timer.within("experts"):
            return experts(sent.x, sent.expert_index, sent.weight, num_rows=sent.num_rows, part=part)
