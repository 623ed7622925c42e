"""Copies of tokens as rows, and sums of a token's rows, with hand-written backward passes.

Autograd's backward of `x[index]` is a scatter-add, row by row. Here each token's rows are known, so it is a gather too.

# N tokens, k slots per token, R rows, D width.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.ops.expert_order import ExpertOrder, rows_of_slots, sum_slots
from trainer.ops.first_derivative import only_first_derivative


def gather_rows(x: Tensor, order: ExpertOrder) -> Tensor:
    """Return the rows (R, D) of tokens x (N, D); those of empty rows are not defined."""
    return _GatherRows.apply(x, order)


def sum_rows(rows: Tensor, order: ExpertOrder, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return (N, D): the sum of each token's rows (R, D), in slot order, in `dtype` or that of the rows."""
    return _SumRows.apply(rows, order, dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: ExpertOrder) -> Tensor:
        _save(ctx, order)
        return x.index_select(0, order.token_of_row)

    @staticmethod
    @only_first_derivative
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        (slot_of_row,) = ctx.saved_tensors
        return sum_slots(grad_rows, rows_of_slots(slot_of_row, ctx.shape), is_full=ctx.is_full), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: ExpertOrder, dtype: torch.dtype | None) -> Tensor:
        _save(ctx, order)
        ctx.dtype = rows.dtype
        return sum_slots(rows, order.row_of_slot, is_full=order.is_full, dtype=dtype)

    @staticmethod
    @only_first_derivative
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot_of_row,) = ctx.saved_tensors
        token_of_row = slot_of_row // ctx.shape[1]
        if not ctx.has_empty_rows:
            return grad.to(ctx.dtype).index_select(0, token_of_row), None, None
        grad = torch.cat([grad.to(ctx.dtype), grad.new_zeros(1, grad.shape[1], dtype=ctx.dtype)])
        return grad.index_select(0, token_of_row), None, None


def _save(ctx: Any, order: ExpertOrder) -> None:
    ctx.save_for_backward(order.saved)
    ctx.shape, ctx.is_full = order.row_of_slot.shape, order.is_full
    ctx.has_empty_rows = order.has_empty_rows
