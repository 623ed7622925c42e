"""The experts' feed-forward of tokens as one autograd node that saves its input X and the hidden values H only.

    y_t = sum_e s_te * W_out_e act(W_in_e x_t) = sum_e W_out_e (s_te * act(h_te))

The combine weight s is applied before the second product, which without biases is the same. So no expert's output is
needed backward: with dA' = W_out^T dy, the gradient of the weight is ds = <dA', act(h)>, and that of h is
act'(h) * s * dA'. Rows of X are gathered and the activation is computed again, and weights are rounded again.

Source: SonicMoE (arXiv 2512.14080), for the gradient of s and for what is saved.

# N tokens, k slots per token, R rows, E experts, D d_model, F d_ff, H width before the activation (2 F for swiglu).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


class FFNKernel(ABC):
    """Computes the rows of all experts, forward and backward; all kernels are equal up to rounding."""

    def __init__(self, activation: WeightedActivation) -> None:
        self.activation = activation

    @abstractmethod
    def forward(self, rows: ExpertRows, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs (R, D) and the hidden values (R or more, H).

        The weights w_in (E, H, D) and w_out (E, D, F) may be wider than the rows, whose dtype is that of the products.
        """

    @abstractmethod
    def hidden(self, rows: ExpertRows, w_in: Tensor) -> Tensor:
        """Return the hidden values again."""

    @abstractmethod
    def backward(self, grad: Tensor, rows: ExpertRows, h: Tensor, w_in: Tensor, w_out: Tensor) -> RowGradients:
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
        recompute: compute the hidden values again in the backward pass instead of saving them.

    Returns:
        (N, D) in the wider dtype of the products and of weight; in that of the products if k is 1, where nothing is
        summed.
    """
    return _RoutedFFN.apply(x, weight, order, w_in, w_out, kernel, dtype, recompute)


class _RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        order: ExpertOrder,
        w_in: Tensor,
        w_out: Tensor,
        kernel: FFNKernel,
        dtype: torch.dtype,
        recompute: bool,
    ) -> Tensor:
        dtype_of_sum = torch.promote_types(dtype, weight.dtype) if weight.shape[1] > 1 else dtype
        if len(order.slot_of_row) == 0:  # kernels refuse empty operands
            h, y = x.new_empty(0, w_in.shape[1], dtype=dtype), torch.zeros_like(x, dtype=dtype_of_sum)
        else:
            rows = _rows(x.to(dtype), weight, order.slot_of_row, order.rows_per_expert)
            y, h = kernel.forward(rows, w_in, w_out)
            y = sum_slots(y, order.row_of_slot, is_full=order.is_full, dtype=dtype_of_sum)
        ctx.save_for_backward(x, weight, order.saved, order.rows_per_expert, w_in, w_out, None if recompute else h)
        ctx.shape, ctx.is_full, ctx.kernel, ctx.dtype = order.row_of_slot.shape, order.is_full, kernel, dtype
        return y

    @staticmethod
    @only_first_derivative
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, slot_of_row, rows_per_expert, w_in, w_out, h = ctx.saved_tensors
        if len(slot_of_row) == 0:
            zeros = (torch.zeros_like(tensor) for tensor in (x, weight, w_in, w_out))
            dx, dweight, dw_in, dw_out = zeros
            return dx, dweight, None, dw_in, dw_out, None, None, None
        rows = _rows(x.to(ctx.dtype), weight, slot_of_row, rows_per_expert)
        if h is None:
            h = ctx.kernel.hidden(rows, w_in)
        grads = ctx.kernel.backward(grad.to(ctx.dtype).contiguous(), rows, h, w_in, w_out)
        dx = sum_slots(grads.x, rows_of_slots(slot_of_row, ctx.shape), is_full=ctx.is_full)
        dweight = weight.new_zeros(ctx.shape.numel() + 1)
        dweight.index_copy_(0, slot_of_row.long(), grads.scale.to(weight.dtype))
        dweight = dweight[:-1].view(ctx.shape)
        return dx.to(x.dtype), dweight, None, grads.w_in, grads.w_out, None, None, None


def _rows(x: Tensor, weight: Tensor, slot_of_row: Tensor, rows_per_expert: Tensor) -> ExpertRows:
    return ExpertRows(
        x=x,
        token_of_row=tokens_of_rows(slot_of_row, weight.shape),
        scale=values_of_rows(weight, slot_of_row),
        rows_per_expert=rows_per_expert,
    )
