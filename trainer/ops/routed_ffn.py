"""The experts' feed-forward of tokens as one autograd node that saves its input X and the hidden values H only.

    y_t = sum_e s_te * W_out_e act(W_in_e x_t) = sum_e W_out_e (s_te * act(h_te))

The combine weight s is applied before the second product, which is the same. So no expert's output is needed backward:
with dA' = W_out^T dy, the gradient of the weight is ds = <dA', act(h)>, and that of h is act'(h) * s * dA'. Rows of X
are gathered and the activation is computed again, and weights are rounded again.

A bias of the first product is part of h. One of the second, b, is added to tokens and not to rows: with S (N, E), the
weight of each token's experts, y += S b, ds_te += <dy_t, b_e> and db = S^T dy: three products that are as narrow as E,
where copies of b for all rows would cost as much as reading and writing the outputs again, three times.

Source: SonicMoE (arXiv 2512.14080), for the gradient of s and for what is saved.

# N tokens, k slots per token, R rows, E experts, D d_model, F d_ff, H width before the activation (2 F with a gate).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.ops.expert_ffn import ExpertBiases
from trainer.ops.expert_order import ExpertOrder, rows_of_slots, sum_slots, tokens_of_rows, values_of_rows
from trainer.ops.first_derivative import only_first_derivative
from trainer.ops.weighted_activation import WeightedActivation


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRows:
    """Rows of an experts' computation, in expert order."""

    x: Tensor
    """(N, D) tokens."""
    token_of_row: Tensor
    """(R,)."""
    scale: Tensor
    """(R,) combine weights, 0 for empty rows."""
    rows_per_expert: Tensor
    """(E,)."""

    @property
    def expert_of_row(self) -> Tensor:
        """(R,) int64; some expert for rows after the last group."""
        place = torch.arange(len(self.scale), device=self.scale.device)
        found = torch.searchsorted(self.rows_per_expert.cumsum(0), place, right=True)
        return found.clamp_(max=len(self.rows_per_expert) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGradients:
    """Gradients of an experts' computation."""

    x: Tensor
    """(R, D)."""
    scale: Tensor
    """(R,)."""
    w_in: Tensor
    """(E, H, D), in the dtype of the weights; zeros for experts without rows."""
    w_out: Tensor
    """(E, D, F)."""
    bias: Tensor | None
    """(E, H), in the dtype of the bias; None without one."""


class FFNKernel(ABC):
    """Computes the rows of all experts, forward and backward; all kernels are equal up to rounding."""

    def __init__(self, activation: WeightedActivation) -> None:
        self.activation = activation

    @abstractmethod
    def forward(self, rows: ExpertRows, w_in: Tensor, w_out: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs (R, D) and the hidden values (R or more, H), to which the bias (E, H) is added.

        The weights w_in (E, H, D) and w_out (E, D, F) and the bias may be wider than the rows, whose dtype is that of
        the products.
        """

    @abstractmethod
    def hidden(self, rows: ExpertRows, w_in: Tensor, bias: Tensor | None) -> Tensor:
        """Return the hidden values again."""

    @abstractmethod
    def backward(
        self, grad: Tensor, rows: ExpertRows, h: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None
    ) -> RowGradients:
        """Return the gradients, given that of the tokens' sums (N, D) and the hidden values."""


def routed_ffn(
    x: Tensor,
    weight: Tensor,
    order: ExpertOrder,
    w_in: Tensor,
    w_out: Tensor,
    kernel: FFNKernel,
    *,
    dtype: torch.dtype,
    biases: ExpertBiases | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return for each token the weighted sum of its experts' outputs, in slot order.

    Args:
        x: (N, D); rounded to `dtype` and, so that no rounded copy is kept, again in the backward pass.
        weight: (N, k) combine weights, at least float32; ignored in slots without a row.
        order: of the rows.
        w_in: (E, H, D).
        w_out: (E, D, F).
        kernel: computes the rows.
        dtype: of the products.
        biases: of the two products.
        recompute: compute the hidden values again in the backward pass instead of saving them.

    Returns:
        (N, D) in the wider dtype of the products and of weight; in that of the products if k is 1, where nothing is
        summed.
    """
    b_in, b_out = biases or (None, None)
    return _RoutedFFN.apply(x, weight, order, w_in, w_out, b_in, b_out, kernel, dtype, recompute)


class _RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        order: ExpertOrder,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        kernel: FFNKernel,
        dtype: torch.dtype,
        recompute: bool,
    ) -> Tensor:
        dtype_of_sum = torch.promote_types(dtype, weight.dtype) if weight.shape[1] > 1 else dtype
        if len(order.slot_of_row) == 0:  # kernels refuse empty operands
            h, y = x.new_empty(0, w_in.shape[1], dtype=dtype), torch.zeros_like(x, dtype=dtype_of_sum)
        else:
            rows = _rows(x.to(dtype), weight, order.slot_of_row, order.rows_per_expert)
            y, h = kernel.forward(rows, w_in, w_out, b_in)
            y = sum_slots(y, order.row_of_slot, is_full=order.is_full, dtype=dtype_of_sum)
            if b_out is not None:
                y += _weight_matrix(rows) @ b_out.to(dtype)
        saved = (order.saved, order.rows_per_expert, w_in, w_out, b_in, b_out, None if recompute else h)
        ctx.save_for_backward(x, weight, *saved)
        ctx.shape, ctx.is_full, ctx.kernel, ctx.dtype = order.row_of_slot.shape, order.is_full, kernel, dtype
        return y

    @staticmethod
    @only_first_derivative
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, slot_of_row, rows_per_expert, w_in, w_out, b_in, b_out, h = ctx.saved_tensors
        if len(slot_of_row) == 0:
            given = (x, weight, None, w_in, w_out, b_in, b_out, None, None, None)
            return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in given)
        rows = _rows(x.to(ctx.dtype), weight, slot_of_row, rows_per_expert)
        if h is None:
            h = ctx.kernel.hidden(rows, w_in, b_in)
        dy = grad.to(ctx.dtype).contiguous()
        grads = ctx.kernel.backward(dy, rows, h, w_in, w_out, b_in)
        d_scale, db_out = grads.scale, None
        if b_out is not None:
            d_scale = d_scale + (dy @ b_out.to(dy.dtype).T).view(-1)[_cells(rows)]
            db_out = (_weight_matrix(rows).T @ dy).to(b_out.dtype)
        dx = sum_slots(grads.x, rows_of_slots(slot_of_row, ctx.shape), is_full=ctx.is_full)
        dweight = weight.new_zeros(ctx.shape.numel() + 1)
        dweight.index_copy_(0, slot_of_row.long(), d_scale.to(weight.dtype))
        dweight = dweight[:-1].view(ctx.shape)
        return dx.to(x.dtype), dweight, None, grads.w_in, grads.w_out, grads.bias, db_out, None, None, None


def _rows(x: Tensor, weight: Tensor, slot_of_row: Tensor, rows_per_expert: Tensor) -> ExpertRows:
    return ExpertRows(
        x=x,
        token_of_row=tokens_of_rows(slot_of_row, weight.shape),
        scale=values_of_rows(weight, slot_of_row),
        rows_per_expert=rows_per_expert,
    )


def _cells(rows: ExpertRows) -> Tensor:
    """Return (R,) the place of each row's token and expert in a flattened (N, E)."""
    return rows.token_of_row * len(rows.rows_per_expert) + rows.expert_of_row


def _weight_matrix(rows: ExpertRows) -> Tensor:
    """Return S (N, E): the combine weight of each token's experts, else 0; empty rows add their weight of 0."""
    shape = len(rows.x), len(rows.rows_per_expert)
    weights = rows.scale.new_zeros(shape[0] * shape[1]).scatter_add_(0, _cells(rows), rows.scale)
    return weights.view(shape).to(rows.x.dtype)
