"""The dispatcher of one process: all experts are here, so rows are only put into expert order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.moe.dispatch.base import Dispatched, Dispatcher
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import combine_rows, gather_rows

# T tokens, k slots, A assignments, R rows, E experts, D d_model.


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrder:
    """Where each assignment's row is once rows are grouped by expert."""

    token_of_row: Tensor
    """(R,) int64."""
    row_of_slot: Tensor
    """(T, k) int64; R for a slot without a row."""
    rows_per_expert: Tensor
    """(E,) int64."""
    weight: Tensor
    """(T, k) combine weights."""


def group_by_expert(decision: RoutingDecision) -> ExpertOrder:
    """Order kept assignments by expert, and inside an expert by token.

    #  list order   t0e1 t0e0 t1e1 t1e2      expert order   t0e0 | t0e1 t1e1 | t1e2
    #  row_of_slot  [[1, 0], [2, 3]]         token_of_row   [0, 0, 1, 1]
    """
    num_assignments = decision.expert_index.numel()
    dispatched = decision.kept & (decision.expert_index < decision.num_experts)
    # What is not dispatched sorts behind the last expert and is cut off there.
    key = torch.where(dispatched, decision.expert_index, decision.num_experts)
    order = key.argsort(stable=True)  # (A,)
    rows_per_expert = torch.bincount(key, minlength=decision.num_experts + 1)[: decision.num_experts]
    num_rows = int(rows_per_expert.sum())  # waits for the device: R sizes what follows
    order = order[:num_rows]  # (R,) assignment of each row
    row_of_assignment = key.new_full((num_assignments,), num_rows)
    row_of_assignment[order] = torch.arange(num_rows, device=key.device)
    slots, weight = _slots(decision, row_of_assignment, num_rows)
    return ExpertOrder(
        token_of_row=decision.token_index[order], row_of_slot=slots, rows_per_expert=rows_per_expert, weight=weight
    )


def _slots(decision: RoutingDecision, row_of_assignment: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Lay the list out as (T, k), with empty slots for tokens that have fewer assignments than others."""
    if decision.top_k is not None:
        shape = (decision.num_tokens, decision.top_k)
        return row_of_assignment.view(shape), decision.combine_weight.view(shape)
    per_token = torch.bincount(decision.token_index, minlength=decision.num_tokens)
    start = per_token.cumsum(0) - per_token
    # The list is token-major, so an assignment's slot is its distance from its token's first one.
    slot = torch.arange(row_of_assignment.numel(), device=start.device) - start[decision.token_index]
    width = max(1, int(per_token.max())) if decision.num_tokens else 1  # waits for the device
    slots = row_of_assignment.new_full((decision.num_tokens, width), num_rows)
    slots[decision.token_index, slot] = row_of_assignment
    weight = decision.combine_weight.new_zeros(decision.num_tokens, width)
    return slots, weight.index_put((decision.token_index, slot), decision.combine_weight)


class LocalDispatcher(Dispatcher):
    """All experts are here: groups rows by expert and sends nothing."""

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Copy the row of each kept assignment into expert order."""
        order = group_by_expert(decision)
        rows = gather_rows(x, order.token_of_row, order.row_of_slot)
        return Dispatched(x=rows, rows_per_expert=order.rows_per_expert, handle=order)

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum each token's rows with their weights."""
        order: ExpertOrder = dispatched.handle
        return combine_rows(y, order.weight, order.token_of_row, order.row_of_slot, is_compiled=self.is_compiled)
