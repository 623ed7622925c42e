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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.ops.expert_ffn import ExpertBiases
from trainer.ops.expert_order import ExpertOrder, rows_of_slots, sum_slots, tokens_of_rows, values_of_rows
from trainer.ops.ffn_kernel import ExpertRows, FFNKernel, LayerWeights
from trainer.ops.first_derivative import only_first_derivative
from trainer.ops.low_rank import ExpertAdapters, LowRank


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
    adapters: ExpertAdapters | None = None,
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
        adapters: added to w_in and w_out, whatever of these learns.
        recompute: compute the hidden values again in the backward pass instead of saving them.

    Returns:
        (N, D) in the wider dtype of the products and of weight; in that of the products if k is 1, where nothing is
        summed.
    """
    b_in, b_out = biases or (None, None)
    low_in, low_out = adapters or (None, None)
    scales = tuple(None if low is None else low.scale for low in (low_in, low_out))
    how = _How(kernel, dtype, recompute, scales)
    factors = [factor for low in (low_in, low_out) for factor in ((None, None) if low is None else low[:2])]
    return _RoutedFFN.apply(x, weight, order, how, w_in, w_out, b_in, b_out, *factors)


class _How(NamedTuple):
    """How a layer is computed."""

    kernel: FFNKernel
    dtype: torch.dtype
    recompute: bool
    scales: tuple[float | None, ...]
    """Scales of the additions to w_in and w_out; None without one."""


class _RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, order: ExpertOrder, how: _How, *parameters: Tensor | None
    ) -> Tensor:
        """Compute with the parameters w_in, w_out, their biases, and the factors A and B of both additions."""
        weights, b_out = _layer_weights(parameters, how), parameters[3]
        dtype_of_sum = torch.promote_types(how.dtype, weight.dtype) if weight.shape[1] > 1 else how.dtype
        if len(order.slot_of_row) == 0:  # kernels refuse empty operands
            h = x.new_empty(0, weights.w_in.shape[1], dtype=how.dtype)
            y = torch.zeros_like(x, dtype=dtype_of_sum)
        else:
            rows = _rows(x.to(how.dtype), weight, order.slot_of_row, order.rows_per_expert, order.has_empty_rows)
            y, h = how.kernel.forward(rows, weights)
            y = sum_slots(y, order.row_of_slot, is_full=order.is_full, dtype=dtype_of_sum)
            if b_out is not None:
                y += _weight_matrix(rows) @ b_out.to(how.dtype)
        h = None if how.recompute else h
        ctx.save_for_backward(x, weight, order.saved, order.rows_per_expert, h, *parameters)
        ctx.shape, ctx.is_full, ctx.has_empty_rows = order.row_of_slot.shape, order.is_full, order.has_empty_rows
        ctx.how = how
        return y

    @staticmethod
    @only_first_derivative
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, slot_of_row, rows_per_expert, h, *parameters = ctx.saved_tensors
        if len(slot_of_row) == 0:
            given = zip((x, weight, None, None, *parameters), ctx.needs_input_grad, strict=True)
            return tuple(None if t is None or not learns else torch.zeros_like(t) for t, learns in given)
        kernel, dtype, b_out = ctx.how.kernel, ctx.how.dtype, parameters[3]
        weights = _layer_weights(parameters, ctx.how, learns=ctx.needs_input_grad[4:7])
        rows = _rows(x.to(dtype), weight, slot_of_row, rows_per_expert, ctx.has_empty_rows)
        if h is None:
            h = kernel.hidden(rows, weights)
        dy = grad.to(dtype).contiguous()
        grads = kernel.backward(dy, rows, h, weights)
        d_scale, db_out = grads.scale, None
        if b_out is not None:
            d_scale = d_scale + (dy @ b_out.to(dy.dtype).T).view(-1)[_cells(rows)]
            if ctx.needs_input_grad[7]:
                db_out = (_weight_matrix(rows).T @ dy).to(b_out.dtype)
        dx = sum_slots(grads.x, rows_of_slots(slot_of_row, ctx.shape), is_full=ctx.is_full)
        dweight = weight.new_zeros(ctx.shape.numel() + ctx.has_empty_rows)  # the last one is that of empty rows
        dweight.index_copy_(0, slot_of_row.long(), d_scale.to(weight.dtype))
        dweight = (dweight[:-1] if ctx.has_empty_rows else dweight).view(ctx.shape)
        factors = [*(grads.adapter_in or (None, None)), *(grads.adapter_out or (None, None))]
        return dx.to(x.dtype), dweight, None, None, grads.w_in, grads.w_out, grads.bias, db_out, *factors


def _layer_weights(
    parameters: Sequence[Tensor | None], how: _How, *, learns: tuple[bool, bool, bool] = (True, True, True)
) -> LayerWeights:
    """Return the weights that a kernel takes; `learns` is of w_in, w_out and the first bias."""
    w_in, w_out, bias, _, *factors = parameters
    assert w_in is not None and w_out is not None, "a layer has both"
    adapters = ExpertAdapters(
        *(
            None if a is None or b is None or scale is None else LowRank(a, b, scale)
            for a, b, scale in zip(factors[::2], factors[1::2], how.scales, strict=True)
        )
    )
    return LayerWeights(
        w_in=w_in,
        w_out=w_out,
        bias=bias,
        adapters=adapters,
        learns_in=learns[0],
        learns_out=learns[1],
        learns_bias=learns[2],
    )


def _rows(x: Tensor, weight: Tensor, slot_of_row: Tensor, rows_per_expert: Tensor, has_empty_rows: bool) -> ExpertRows:
    return ExpertRows(
        x=x,
        token_of_row=tokens_of_rows(slot_of_row, weight.shape, has_empty_rows=has_empty_rows),
        scale=values_of_rows(weight, slot_of_row, has_empty_rows=has_empty_rows),
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
