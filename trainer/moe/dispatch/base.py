"""Dispatcher interface: sends tokens to their experts and combines the outputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.moe.routing import RoutingDecision
from trainer.step_timer import StepTimer

# T tokens here, N tokens or copies of tokens on the rank of their experts, k slots, D d_model.


class Dispatched(NamedTuple):
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
    """Sends tokens to experts and their outputs back. Depends on ranks, not on routing; has no parameters.

    Between its three parts something else is computed while rows travel, also backward: shared experts, and under
    `parallel.overlap` another micro-batch. What one part returns for the next is a tensor or (named) tuples of them, in
    which FSDP2 finds the tensors that it has to watch.
    """

    step_timer: StepTimer = StepTimer()
    """Measures the parts of `forward`, once started; `parallelize` sets that of the run."""

    def forward(self, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> Tensor:
        """Return (T, D): the weighted sum of the outputs of each token's experts, in slot order.

        It is in the wider dtype of x (T, D) and the combine weights; 0 for a token without experts.
        """
        y = self.finish(self.compute(self.begin(x, decision), experts))
        return y.to(torch.promote_types(x.dtype, decision.combine_weight.dtype))

    @abstractmethod
    def begin(self, x: Tensor, decision: RoutingDecision) -> Any:
        """Start to send each kept assignment of x (T, D) to its expert; the result is for `compute`."""

    @abstractmethod
    def compute(self, begun: Any, experts: RunExperts) -> Any:
        """Apply the experts to what arrives, and start to send their outputs back; the result is for `finish`."""

    @abstractmethod
    def finish(self, computed: Any) -> Tensor:
        """Wait for the outputs and return the sum of each token's (T, D)."""

    def apply(self, sent: Dispatched, experts: RunExperts, part: tuple[int, int] | None = None) -> Tensor:
        """Apply the experts here, or those in `part`, to tokens: (N, D)."""
        with self.step_timer.within("experts"):
            return experts(sent.x, sent.expert_index, sent.weight, num_rows=sent.num_rows, part=part)
