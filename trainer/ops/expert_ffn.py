"""The experts' feed-forward networks over rows grouped by expert: the reference, and faster equivalents.

`loop_ffn` is the reference. All functions take the same arguments:

    x: (R, D) rows grouped by expert, ascending.
    rows_per_expert: (E,) int64, sums to R; the weights of an expert without rows get a gradient of zeros
        (`without_idle_gradients`).
    w_in: (E, H, D); H = 2 F for swiglu (gate rows first, then up), F for gelu.
    w_out: (E, D, F).
    activation: "swiglu" (Shazeer 2020, arXiv 2002.05202) or "gelu".

and return (R, D) in x's dtype. Weights are cast to it; their gradients are in their own dtype.

# R rows, E experts, D d_model, F d_ff, H width before the activation, M rows of the busiest expert.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["swiglu", "gelu"]


class _WithoutIdleGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows_per_expert: Tensor) -> Tensor:
        ctx.save_for_backward(rows_per_expert)
        return weight.view_as(weight)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows_per_expert,) = ctx.saved_tensors
        idle = rows_per_expert == 0
        if grad.device.type == "cpu" and not idle.any():  # on a GPU, checking would cost more than writing
            return grad, None
        return grad.masked_fill(idle[:, None, None], 0), None


def without_idle_gradients(weight: Tensor, rows_per_expert: Tensor) -> Tensor:
    """Return weights (E, ., .) unchanged, such that experts without rows (E,) get a gradient of zeros.

    Kernels can leave other values there: torch's grouped product uninitialized memory, on Blackwell (pytorch#172439),
    and the padded one NaN, from zeros times a weight that is not finite.
    """
    return _WithoutIdleGradients.apply(weight, rows_per_expert)


def activate(h: Tensor, activation: Activation) -> Tensor:
    """Apply the activation function: (..., H) -> (..., F)."""
    if activation == "gelu":
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def loop_ffn(x: Tensor, rows_per_expert: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation) -> Tensor:
    """Apply one expert after the other, in plain autograd: the reference for the other kernels."""
    w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
    groups = x.split(rows_per_expert.tolist())  # waits for the device: sizes become shapes
    return torch.cat([activate(rows @ w_in[e].T, activation) @ w_out[e].T for e, rows in enumerate(groups)])


def padded_ffn(x: Tensor, rows_per_expert: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation) -> Tensor:
    """Apply batched products over groups padded to the largest, (E, M, D): for uniform loads and many small experts."""
    num_experts, width = w_in.shape[0], int(rows_per_expert.max())  # waits for the device
    start = rows_per_expert.cumsum(0) - rows_per_expert
    expert = torch.repeat_interleave(torch.arange(num_experts, device=x.device), rows_per_expert, output_size=len(x))
    cell = expert * width + torch.arange(len(x), device=x.device) - start[expert]  # (R,) index in the padded buffer
    groups = x.new_zeros(num_experts * width, x.shape[1]).index_copy(0, cell, x)
    groups = groups.view(num_experts, width, x.shape[1])  # (E, M, D)
    h = torch.bmm(groups, w_in.to(x.dtype).transpose(1, 2))  # (E, M, H)
    y = torch.bmm(activate(h, activation), w_out.to(x.dtype).transpose(1, 2))  # (E, M, D)
    return y.flatten(0, 1).index_select(0, cell)


def grouped_ffn(x: Tensor, rows_per_expert: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation) -> Tensor:
    """Apply torch's grouped matrix product, without padding and without waiting for the sizes. Not for float64."""
    if len(x) == 0:  # kernels refuse empty operands; an empty sum is 0 for any weights, and still depends on them
        return x + (w_in[:, :0].sum() + w_out[:, :0].sum()).to(x.dtype)
    ends = rows_per_expert.cumsum(0).to(torch.int32)
    h = F.grouped_mm(x, w_in.to(x.dtype).transpose(1, 2), offs=ends)  # (R, H)
    return F.grouped_mm(activate(h, activation), w_out.to(x.dtype).transpose(1, 2), offs=ends)
