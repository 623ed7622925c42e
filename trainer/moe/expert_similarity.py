"""Outputs of a token's experts apart from each other, for a loss that compares them.

# T tokens, k slots per token, A assignments, D d_model.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.moe.dispatch.base import Dispatcher, RunExperts
from trainer.moe.dispatch.token_slots import assignment_of_slot
from trainer.moe.routing import RoutingDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOutputs:
    """Output of each assignment's expert."""

    y: Tensor
    """(A, D) without combine weight; 0 if dropped."""
    decision: RoutingDecision

    @classmethod
    def of(cls, dispatcher: Dispatcher, x: Tensor, decision: RoutingDecision, experts: RunExperts) -> "ExpertOutputs":
        """Dispatch every assignment of x (T, D) as a token of its own, with weight 1."""
        number = torch.arange(decision.token_index.numel(), device=x.device)
        apart = replace(
            decision,
            token_index=number,
            combine_weight=torch.ones_like(decision.combine_weight, requires_grad=False),
            num_tokens=len(number),
            top_k=1,
        )
        return cls(y=dispatcher.forward(x.index_select(0, decision.token_index), apart, experts), decision=decision)

    def sums(self) -> Tensor:
        """Return (T, D): the weighted sum of each token's outputs, in slot order."""
        slots = self._by_slot(self.y * self.decision.combine_weight[:, None])
        out = slots[:, 0]
        for slot in range(1, slots.shape[1]):
            out = out + slots[:, slot]
        return out

    def similarity(self) -> Tensor:
        """Return (T,): the mean squared cosine between the outputs of each pair of a token's experts.

        1 if they are parallel; 0 if they are orthogonal or there are fewer than two.
        """
        y = self.y.to(torch.promote_types(self.y.dtype, torch.float32))
        unit = F.normalize(self._by_slot(y), dim=-1)  # (T, k, D); 0 in empty slots
        with torch.autocast(y.device.type, enabled=False):  # a mean of 1 / D would vanish in bfloat16
            squared = (unit @ unit.mT).square()  # (T, k, k)
        decision = self.decision
        is_dispatched = decision.kept & (decision.expert_index < decision.num_experts)
        count = self._by_slot(is_dispatched[:, None].long())[..., 0].sum(-1)  # (T,)
        others = ~torch.eye(unit.shape[1], dtype=torch.bool, device=y.device)
        return (squared * others).sum((1, 2)) / (count * (count - 1)).clamp(min=1)

    def _by_slot(self, values: Tensor) -> Tensor:
        """Return (T, k, n) of values (A, n); 0 in empty slots."""
        return torch.cat([values, values.new_zeros(1, values.shape[1])])[assignment_of_slot(self.decision)]
