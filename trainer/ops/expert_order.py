"""Order of rows by expert: which slot of which token each row is, and back.

# N tokens, k slots per token, R rows, E experts, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrder:
    """Mapping between the slots of tokens and rows grouped by expert."""

    slot_of_row: Tensor
    """(R,) int64 index into the flattened (N, k); N * k for an empty row."""
    row_of_slot: Tensor
    """(N, k) int64; R for a slot without a row."""
    rows_per_expert: Tensor
    """(E,) int64, empty rows of a group included; rows after the last group belong to none."""
    is_full: bool
    """Every slot has a row."""
    has_empty_rows: bool
    """Some rows can be empty."""

    @property
    def saved(self) -> Tensor:
        """`slot_of_row` in half the bytes, if it fits: what a backward pass needs of the order."""
        is_small = self.row_of_slot.numel() < torch.iinfo(torch.int32).max
        return self.slot_of_row.to(torch.int32) if is_small else self.slot_of_row

    @property
    def token_of_row(self) -> Tensor:
        """(R,) int64; an empty row has some token's number, if there is a token."""
        return tokens_of_rows(self.slot_of_row, self.row_of_slot.shape, has_empty_rows=self.has_empty_rows)

    def of_rows(self, values: Tensor) -> Tensor:
        """Return (R,): the value of each row's slot, given values (N, k); 0 for an empty row. Differentiable."""
        return values_of_rows(values, self.slot_of_row, has_empty_rows=self.has_empty_rows)


def order_by_expert(
    expert_index: Tensor, num_experts: int, *, num_rows: int | None = None, multiple: int = 1
) -> ExpertOrder:
    """Order slots by expert, and inside an expert by token, then slot.

    #  expert_index [[1, 0], [1, 2]]     rows   t0s1 | t0s0 t1s0 | t1s1     slot_of_row [1, 0, 2, 3]
    #  multiple 2                        rows   t0s1 .  | t0s0 t1s0 | t1s1 .

    Args:
        expert_index: (N, k) int64; E or more for a slot that needs no row.
        num_experts: E.
        num_rows: number of slots that need a row; None: it is counted, which waits for the device.
        multiple: the rows of each expert are padded to a multiple of this with empty rows. R is then the largest that
            any choice of experts can need, so that nothing waits for it.
    """
    key = expert_index.reshape(-1).clamp(max=num_experts)
    num_slots = key.numel()
    by_expert = key.argsort(stable=True)
    counts = count_slots(key, num_experts)
    if num_rows is None:
        num_rows = int(counts.sum())  # waits for the device
    by_expert = by_expert[:num_rows]  # (num_rows,) slot of each
    if multiple == 1 or num_rows == 0:
        row, slot_of_row, rows_per_expert = torch.arange(num_rows, device=key.device), by_expert, counts
    else:
        rows_per_expert = (counts + multiple - 1) // multiple * multiple
        shift = (rows_per_expert - counts).cumsum(0) - (rows_per_expert - counts)  # (E,) empty rows before
        row = torch.arange(num_rows, device=key.device) + shift[key[by_expert]]
        slot_of_row = key.new_full((num_rows + num_experts * (multiple - 1),), num_slots)
        slot_of_row[row] = by_expert
    row_of_slot = key.new_full((num_slots,), len(slot_of_row)).index_copy_(0, by_expert, row)
    return ExpertOrder(
        slot_of_row=slot_of_row,
        row_of_slot=row_of_slot.view(expert_index.shape),
        rows_per_expert=rows_per_expert,
        is_full=num_rows == num_slots,
        has_empty_rows=multiple > 1,
    )


def count_slots(expert_index: Tensor, num_experts: int) -> Tensor:
    """Return (E,) int64: the number of slots with each expert, given those of slots (...), E for none."""
    key = expert_index.reshape(-1)
    return key.new_zeros(num_experts + 1).scatter_add_(0, key, torch.ones_like(key))[:num_experts]


def tokens_of_rows(slot_of_row: Tensor, shape: torch.Size, *, has_empty_rows: bool) -> Tensor:
    """Return (R,): the token of each row, some token for an empty one, given slots of the shape (N, k)."""
    num_tokens, num_slots = shape
    token = slot_of_row // num_slots
    return token.clamp_(max=max(0, num_tokens - 1)) if has_empty_rows else token


def values_of_rows(values: Tensor, slot_of_row: Tensor, *, has_empty_rows: bool) -> Tensor:
    """Return (R,): the value (N, k) of each row's slot; 0 for an empty row. Differentiable."""
    values = values.reshape(-1)
    if has_empty_rows:
        values = torch.cat([values, values.new_zeros(1)])
    return values.index_select(0, slot_of_row)


def rows_of_slots(slot_of_row: Tensor, shape: torch.Size) -> Tensor:
    """Return (N, k) the row of each slot, R for one without: the inverse of slot_of_row (R,)."""
    slot_of_row = slot_of_row.long()
    rows = slot_of_row.new_full((shape.numel() + 1,), len(slot_of_row))
    rows.index_copy_(0, slot_of_row, torch.arange(len(slot_of_row), device=slot_of_row.device))
    return rows[:-1].view(shape)


def sum_slots(rows: Tensor, row_of_slot: Tensor, *, is_full: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Return (N, D): the sum of each token's rows (R, D), in slot order; a slot without a row adds nothing.

    `dtype` is that of the sum; None: that of the rows.
    """
    if not is_full:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    out = rows.index_select(0, row_of_slot[:, 0]).to(dtype or rows.dtype)
    for slot in range(1, row_of_slot.shape[1]):
        out += rows.index_select(0, row_of_slot[:, slot])
    return out
