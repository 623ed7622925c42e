"""Moving token rows into expert order and back, with the backward written out.

Autograd's own backward of `x[index]` adds rows one by one;
here every token's rows are known, so it is a gather as well.

# T tokens, k slots per token, A = T * k assignments, R <= A rows, D width.
# row_of_slot (T, k): the row that assignment (t, slot) became, or R if it has none (dropped, or not valid).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _with_zero_row(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    """Append the row of zeros that index R means, if any slot can ask for it."""
    if rows.shape[0] == row_of_slot.numel():
        return rows
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_slot)
        return x.index_select(0, token_of_row)  # (R, D)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (row_of_slot,) = ctx.saved_tensors
        grad_rows = _with_zero_row(grad_rows, row_of_slot)
        grad_x = grad_rows.index_select(0, row_of_slot[:, 0])  # (T, D)
        for slot in range(1, row_of_slot.shape[1]):
            grad_x += grad_rows.index_select(0, row_of_slot[:, slot])
        return grad_x, None, None


def _combine(rows: Tensor, weight: Tensor, row_of_slot: Tensor) -> Tensor:
    """Return (T, D) in the wider dtype: the sum over slots, one after the other, so that its order is the slots'."""
    rows = _with_zero_row(rows, row_of_slot)
    out = rows.index_select(0, row_of_slot[:, 0]) * weight[:, :1]
    for slot in range(1, row_of_slot.shape[1]):
        out += rows.index_select(0, row_of_slot[:, slot]) * weight[:, slot : slot + 1]
    return out


def _combine_backward(
    grad_out: Tensor, rows: Tensor, weight_of_row: Tensor, token_of_row: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows (R, D) and of their weights (R,)."""
    grad_of_row = grad_out.index_select(0, token_of_row)  # (R, D)
    grad_weight = (grad_of_row * rows).sum(-1).to(weight_of_row.dtype)
    return (grad_of_row * weight_of_row[:, None]).to(rows.dtype), grad_weight


@cache
def _combine_parts(compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    if compiled:  # one pass over the rows each, instead of one for every operation
        return torch.compile(_combine, dynamic=True), torch.compile(_combine_backward, dynamic=True)
    return _combine, _combine_backward


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, token_of_row: Tensor, row_of_slot: Tensor, is_compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, token_of_row, row_of_slot)
        combine, ctx.combine_backward = _combine_parts(is_compiled)
        return combine(rows, weight, row_of_slot)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, weight, token_of_row, row_of_slot = ctx.saved_tensors
        num_rows = rows.shape[0]
        slot_of_row = weight.new_empty(num_rows + 1, dtype=torch.int64)
        slot_of_row[row_of_slot.reshape(-1)] = torch.arange(row_of_slot.numel(), device=rows.device)
        slot_of_row = slot_of_row[:num_rows]  # (R,) index into the flattened (T, k)
        grad_rows, grad_of_row = ctx.combine_backward(grad_out, rows, weight.reshape(-1)[slot_of_row], token_of_row)
        grad_weight = torch.zeros_like(weight)
        grad_weight.view(-1)[slot_of_row] = grad_of_row
        return grad_rows, grad_weight, None, None, None


def gather_rows(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """Copy tokens into rows.

    Args:
        x: (T, D).
        token_of_row: (R,) int64.
        row_of_slot: (T, k) int64 in [0, R], the inverse; R for a slot without a row.

    Returns:
        (R, D) rows.
    """
    return _GatherRows.apply(x, token_of_row, row_of_slot)


def combine_rows(
    rows: Tensor, weight: Tensor, token_of_row: Tensor, row_of_slot: Tensor, *, is_compiled: bool = False
) -> Tensor:
    """Sum every token's rows with their weights, in slot order; a slot without a row adds nothing.

    Args:
        rows: (R, D).
        weight: (T, k), at least float32; differentiable.
        token_of_row: (R,) int64.
        row_of_slot: (T, k) int64 in [0, R].
        is_compiled: make one compiled pass of it, forward and backward.

    Returns:
        (T, D) in the wider dtype of rows and weight.
    """
    return _CombineRows.apply(rows, weight, token_of_row, row_of_slot, is_compiled)
