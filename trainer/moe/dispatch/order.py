"""Row orders: by expert on the rank of the tokens, and again on the rank of the experts.

# T tokens, k slots, A assignments, R rows, E experts, G ranks of the expert-parallel group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import combine_rows, gather_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrder:
    """Mapping between assignments and rows grouped by expert."""

    token_of_row: Tensor
    """(R,) int64; T for an empty row."""
    row_of_slot: Tensor
    """(T, k) int64; R for a slot without a row."""
    rows_per_expert: Tensor
    """(E,) int64."""
    weight: Tensor
    """(T, k) combine weights."""
    is_full: bool
    """Every slot has a row."""

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows (R, D) of tokens x (T, D)."""
        return gather_rows(x, self.token_of_row, self.row_of_slot, is_full=self.is_full)

    def combine(self, rows: Tensor, *, is_compiled: bool) -> Tensor:
        """Return (T, D): the weighted sum of each token's rows (R, D), in slot order."""
        return combine_rows(
            rows, self.weight, self.token_of_row, self.row_of_slot, is_full=self.is_full, is_compiled=is_compiled
        )


def group_by_expert(decision: RoutingDecision) -> ExpertOrder:
    """Order kept assignments by expert, and inside an expert by token.

    #  list order   t0e1 t0e0 t1e1 t1e2      expert order   t0e0 | t0e1 t1e1 | t1e2
    #  row_of_slot  [[1, 0], [2, 3]]         token_of_row   [0, 0, 1, 1]
    """
    num_assignments = decision.expert_index.numel()
    key = _expert_or_none(decision)
    order = key.argsort(stable=True)  # (A,)
    rows_per_expert = torch.bincount(key, minlength=decision.num_experts + 1)[: decision.num_experts]
    num_rows = int(rows_per_expert.sum())  # waits for the device: R sizes what follows
    order = order[:num_rows]  # (R,) assignment of each row
    row_of_assignment = key.new_full((num_assignments,), num_rows)
    row_of_assignment[order] = torch.arange(num_rows, device=key.device)
    slots, weight = _slots(decision, row_of_assignment, num_rows)
    return ExpertOrder(
        token_of_row=decision.token_index[order],
        row_of_slot=slots,
        rows_per_expert=rows_per_expert,
        weight=weight,
        is_full=num_rows == slots.numel(),
    )


def pad_to_capacity(decision: RoutingDecision) -> ExpertOrder:
    """Pad every expert to exactly `capacity` rows; no shape depends on the decision.

    #  capacity 2   t0e0 . | t0e1 t1e1 | t1e2 .      token_of_row   [0, T, 0, 1, 1, T]    T: an empty row
    """
    assert decision.capacity is not None, "only a limited decision has static sizes"
    capacity, num_rows = decision.capacity, decision.capacity * decision.num_experts
    key = _expert_or_none(decision)
    order = key.argsort(stable=True)  # (A,)
    counts = torch.bincount(key, minlength=decision.num_experts + 1)
    start = counts.cumsum(0) - counts
    index = torch.arange(key.numel(), device=key.device) - start[key[order]]  # (A,) within the expert
    row = torch.where(key[order] < decision.num_experts, key[order] * capacity + index, num_rows)
    row_of_assignment = torch.empty_like(row).index_copy_(0, order, row)
    token_of_row = torch.full((num_rows + 1,), decision.num_tokens, device=key.device)
    token_of_row[row_of_assignment] = decision.token_index
    slots, weight = _slots(decision, row_of_assignment, num_rows)
    return ExpertOrder(
        token_of_row=token_of_row[:num_rows],
        row_of_slot=slots,
        rows_per_expert=torch.full_like(counts[: decision.num_experts], capacity),
        weight=weight,
        is_full=False,
    )


def _expert_or_none(decision: RoutingDecision) -> Tensor:
    """Return (A,) the expert of each assignment; E, which sorts last, if it is not dispatched."""
    dispatched = decision.kept & (decision.expert_index < decision.num_experts)
    return torch.where(dispatched, decision.expert_index, decision.num_experts)


def _slots(decision: RoutingDecision, row_of_assignment: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Reshape assignments to (T, k), with empty slots for tokens that have fewer than the most."""
    if decision.top_k is not None:
        shape = (decision.num_tokens, decision.top_k)
        return row_of_assignment.view(shape), decision.combine_weight.view(shape)
    per_token = torch.bincount(decision.token_index, minlength=decision.num_tokens)
    start = per_token.cumsum(0) - per_token
    # Assignments are token-major, so a slot is the distance from the token's first assignment.
    slot = torch.arange(row_of_assignment.numel(), device=start.device) - start[decision.token_index]
    width = max(1, int(per_token.max())) if decision.num_tokens else 1  # waits for the device
    slots = row_of_assignment.new_full((decision.num_tokens, width), num_rows)
    slots[decision.token_index, slot] = row_of_assignment
    weight = decision.combine_weight.new_zeros(decision.num_tokens, width)
    return slots, weight.index_put((decision.token_index, slot), decision.combine_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangePlan:
    """Send and receive counts of one rank, and the order of received rows; all ranks derive it from the same table."""

    sizes: list[list[int]]
    """(G, G) rows from each rank to each rank."""
    order: Tensor
    """(R,) int64 arrival index of each row, grouped by expert and within an expert by sender."""
    rows_per_expert: Tensor
    """(E_local,) int64."""

    @property
    def sizes_back(self) -> list[list[int]]:
        """(G, G) rows from each rank to each rank in the combine."""
        return [list(column) for column in zip(*self.sizes, strict=True)]


def plan_exchange(counts: Tensor, bounds: Sequence[tuple[int, int]], index: int) -> ExchangePlan:
    """Plan the exchange of one rank.

    #  bounds (0, 2) (2, 3)   counts [[1, 2, 4],    index 0   send [3, 4]   receive [3, 6]
    #                                 [5, 1, 0]]              arrive  0: e0 e1 e1   1: e0 e0 e0 e0 e0 e1
    #                                                         order   0 3 4 5 6 7 | 1 2 8

    Args:
        counts: (G, E) int64 rows of each rank for each expert.
        bounds: (G,) first and last + 1 expert of each rank.
        index: of the rank in the group.
    """
    sizes = torch.stack([counts[:, first:end].sum(1) for first, end in bounds], dim=1).tolist()  # [from][to]
    first, end = bounds[index]
    mine = counts[:, first:end]  # (G, E_local)
    expert = torch.arange(end - first, device=counts.device).repeat(len(bounds))
    return ExchangePlan(
        sizes=sizes, order=expert.repeat_interleave(mine.reshape(-1)).argsort(stable=True), rows_per_expert=mine.sum(0)
    )
