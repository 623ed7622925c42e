"""The experts of each token as a table, and rows padded to a capacity.

# T tokens, k slots per token, A assignments, R rows, E experts, C capacity.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.moe.routing import RoutingDecision
from trainer.ops.expert_order import ExpertOrder, count_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSlots:
    """Experts of each token, best first."""

    expert_index: Tensor
    """(T, k) int64; E for a slot that is dispatched nowhere."""
    weight: Tensor
    """(T, k) combine weights."""
    num_experts: int
    num_rows: int | None
    """Number of slots with an expert; None if only the device knows it."""

    @classmethod
    def of(cls, decision: RoutingDecision) -> "TokenSlots":
        """Arrange the assignments of a decision; tokens that have fewer than the most get empty slots."""
        expert = decision.expert_index  # (A,)
        if decision.num_rows != expert.numel():  # not all are dispatched, or only the device knows
            is_dispatched = decision.kept & (expert < decision.num_experts)
            expert = torch.where(is_dispatched, expert, decision.num_experts)
        weight, num_experts = decision.combine_weight, decision.num_experts
        if decision.top_k is not None:
            shape = (decision.num_tokens, decision.top_k)
            expert, weight = expert.view(shape), weight.view(shape)
        else:
            slots = assignment_of_slot(decision)  # (T, k)
            expert = torch.cat([expert, expert.new_full((1,), num_experts)])[slots]
            weight = torch.cat([weight, weight.new_zeros(1)])[slots]
        return cls(expert_index=expert, weight=weight, num_experts=num_experts, num_rows=decision.num_rows)

    def widened(self, num_slots: int) -> "TokenSlots":
        """Append empty slots until a token has this many."""
        missing = (0, num_slots - self.expert_index.shape[1])
        expert_index = F.pad(self.expert_index, missing, value=self.num_experts)
        return replace(self, expert_index=expert_index, weight=F.pad(self.weight, missing))

    def counts(self) -> Tensor:
        """Return (E,) int64: the number of slots with each expert."""
        return count_slots(self.expert_index, self.num_experts)

    def pad_to_capacity(self, capacity: int) -> ExpertOrder:
        """Return rows that are padded to exactly `capacity` for every expert; no shape depends on the decision.

        #  capacity 2   t0e0 . | t0e1 t1e1 | t1e2 .
        """
        key, num_experts = self.expert_index.reshape(-1), self.num_experts
        return self.pad_queues(key, num_experts, capacity, key.new_full((num_experts,), capacity))[0]

    def pad_queues(
        self, queue: Tensor, num_queues: int, length: int, rows_per_expert: Tensor
    ) -> tuple[ExpertOrder, Tensor]:
        """Return rows that are padded to `length` for each queue of consecutive experts, and the slots of each queue.

        A slot that finds its queue full has no row. `queue` (T * k,) is that of each slot; `num_queues` for none.
        """
        key = self.expert_index.reshape(-1)
        num_rows, num_slots = num_queues * length, key.numel()
        by_expert = key.argsort(stable=True)  # slots
        counts, queue = count_slots(queue, num_queues), queue[by_expert]
        start = F.pad(counts.cumsum(0), (1, 0))  # (queues + 1,)
        index = torch.arange(num_slots, device=key.device) - start[queue]  # within the queue
        row = torch.where((queue < num_queues) & (index < length), queue * length + index, num_rows)
        slot_of_row = key.new_full((num_rows + 1,), num_slots).index_copy_(0, row, by_expert)
        order = ExpertOrder(
            slot_of_row=slot_of_row[:-1],
            row_of_slot=torch.empty_like(row).index_copy_(0, by_expert, row).view_as(self.expert_index),
            rows_per_expert=rows_per_expert,
            is_full=False,
            has_empty_rows=True,
        )
        return order, counts


def assignment_of_slot(decision: RoutingDecision) -> Tensor:
    """Return (T, k): the assignment in each slot of a token, A for none; k is the most that a token has."""
    token, num_assignments = decision.token_index, decision.token_index.numel()
    if decision.top_k is not None:
        return torch.arange(num_assignments, device=token.device).view(decision.num_tokens, decision.top_k)
    per_token = count_slots(token, decision.num_tokens)
    start = per_token.cumsum(0) - per_token
    number = torch.arange(num_assignments, device=token.device)
    slot = number - start[token]  # assignments are token-major: the distance from the token's first
    most = decision.most_per_token
    if most is None:
        most = int(per_token.max()) if decision.num_tokens else 0  # waits for the device
    return token.new_full((decision.num_tokens, max(1, most)), num_assignments).index_put_((token, slot), number)
