"""Move token rows into expert order and back, with hand-written backward passes.

Autograd's backward of `x[index]` is a scatter-add, row by row. Here each token's rows are known, so it is a gather too.

# T tokens, k slots per token, A = T * k assignments, R <= A rows, D width.
# row_of_slot (T, k): the row of assignment (t, slot), or R if it has none (dropped, or padding).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _with_zero_row(rows: Tensor, is_full: bool) -> Tensor:
    """Append the row of zeros at index R, unless every slot has a row."""
    return rows if is_full else torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor, is_full: bool) -> Tensor:
        ctx.save_for_backward(row_of_slot)
        ctx.is_full = is_full
        return x.index_select(0, token_of_row)  # (R, D)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
        (row_of_slot,) = ctx.saved_tensors
        grad_rows = _with_zero_row(grad_rows, ctx.is_full)
        grad_x = grad_rows.index_select(0, row_of_slot[:, 0])  # (T, D)
        for slot in range(1, row_of_slot.shape[1]):
            grad_x += grad_rows.index_select(0, row_of_slot[:, slot])
        return grad_x, None, None, None


def _combine(rows: Tensor, weight: Tensor, row_of_slot: Tensor, is_full: bool) -> Tensor:
    """Return (T, D) in the wider dtype: the weighted sum over slots, accumulated in slot order."""
    rows = _with_zero_row(rows, is_full)
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
    if compiled:  # one pass over the rows instead of one per operation
        return torch.compile(_combine, dynamic=True), torch.compile(_combine_backward, dynamic=True)
    return _combine, _combine_backward


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        token_of_row: Tensor,
        row_of_slot: Tensor,
        is_full: bool,
        is_compiled: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, token_of_row, row_of_slot)
        combine, ctx.combine_backward = _combine_parts(is_compiled)
        return combine(rows, weight, row_of_slot, is_full)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows, weight, token_of_row, row_of_slot = ctx.saved_tensors
        num_slots, num_tokens = row_of_slot.numel(), len(grad_out)
        # Rows without a slot get the index after the last slot, where the weight is 0.
        slot_of_row = row_of_slot.new_full((len(rows) + 1,), num_slots)
        slot_of_row[row_of_slot.reshape(-1)] = torch.arange(num_slots, device=rows.device)
        slot_of_row = slot_of_row[:-1]  # (R,) index into the flattened (T, k)
        weight_of_row = torch.cat([weight.reshape(-1), weight.new_zeros(1)])[slot_of_row]
        token_of_row = token_of_row.clamp(max=num_tokens - 1)
        grad_rows, grad_of_row = ctx.combine_backward(grad_out, rows, weight_of_row, token_of_row)
        grad_weight = weight.new_zeros(num_slots + 1)
        grad_weight[slot_of_row] = grad_of_row
        grad_weight = grad_weight[:-1].view_as(weight)
        return grad_rows, grad_weight, None, None, None, None


def gather_rows(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor, *, is_full: bool = False) -> Tensor:
    """Copy tokens into rows in expert order.

    Args:
        x: (T, D).
        token_of_row: (R,) int64.
        row_of_slot: (T, k) int64 in [0, R], the inverse mapping; R for a slot without a row.
        is_full: every slot has a row, which saves a copy.

    Returns:
        (R, D) rows.
    """
    return _GatherRows.apply(x, token_of_row, row_of_slot, is_full)


def combine_rows(
    rows: Tensor,
    weight: Tensor,
    token_of_row: Tensor,
    row_of_slot: Tensor,
    *,
    is_full: bool = False,
    is_compiled: bool = False,
) -> Tensor:
    """Return the weighted sum of each token's rows, in slot order; a slot without a row adds nothing.

    Args:
        rows: (R, D).
        weight: (T, k), at least float32; differentiable.
        token_of_row: (R,) int64; T for an empty row.
        row_of_slot: (T, k) int64 in [0, R].
        is_full: every slot has a row, which saves a copy.
        is_compiled: use the compiled forward and backward.

    Returns:
        (T, D) in the wider dtype of rows and weight.
    """
    return _CombineRows.apply(rows, weight, token_of_row, row_of_slot, is_full, is_compiled)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, is_inverse: bool) -> Tensor:
        ctx.save_for_backward(order)
        ctx.is_inverse = is_inverse
        return _move(x, order, is_inverse)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _move(grad, order, not ctx.is_inverse), None, None


def _move(x: Tensor, order: Tensor, is_inverse: bool) -> Tensor:
    return torch.empty_like(x).index_copy_(0, order, x) if is_inverse else x.index_select(0, order)


def permute_rows(x: Tensor, order: Tensor) -> Tensor:
    """Return rows order[0], order[1], ... of x (R, D); order (R,) is a permutation of 0 .. R - 1."""
    return _Permute.apply(x, order, False)


def unpermute_rows(x: Tensor, order: Tensor) -> Tensor:
    """Undo `permute_rows`: row i of x (R, D) moves to index order[i]."""
    return _Permute.apply(x, order, True)
