"""The experts' feed-forward as one autograd node, with in-place weight gradients and rounded group sizes.

Plain autograd is slow outside the products: the backward of `w[e]` allocates a full-size tensor of zeros per expert and
sums them, and on the CPU every new size of a bfloat16 product builds a kernel first (2 to 4 ms, more than the product),
while routing yields new sizes in every step. Here each expert runs both layers before the next one starts, so that
intermediate results stay in the cache.

# R rows, Rp >= R rows with padding, E experts, D d_model, F d_ff, H width before the activation.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.expert_ffn import Activation

ROWS_MULTIPLE = 64
"""Group sizes are rounded up to a multiple of this if the library (oneDNN) builds a kernel for every size."""


@dataclass(frozen=True, slots=True)
class FusedParts:
    """Implementation choices of the fused node, all equal up to rounding."""

    product: Callable[[Tensor, Tensor], Tensor]
    """x (n, K), w (N, K) with any strides -> x @ w.T (n, N)."""
    rows_multiple: int
    """Multiple that group sizes are rounded up to."""
    activate: Callable[[Tensor, Activation], Tensor]
    """(n, H) -> (n, F)."""
    activate_backward: Callable[[Tensor, Tensor, Activation], Tensor]
    """Gradient (n, F) and input (n, H) -> gradient (n, H)."""


def fused(
    x: Tensor, rows_per_expert: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation, parts: FusedParts
) -> Tensor:
    """Apply all experts in one autograd node; arguments and result as in `expert_ffn`."""
    return _FusedFFN.apply(x, rows_per_expert, w_in, w_out, activation, parts)


def product(x: Tensor, w: Tensor) -> Tensor:
    """Multiply by torch's default library: MKL for float32 on the CPU."""
    return x @ w.T


def onednn_product(x: Tensor, w: Tensor) -> Tensor:
    """Multiply float32 by oneDNN on the CPU; on AMD processors MKL takes 1.2 to 1.4 times as long."""
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def has_onednn_product() -> bool:
    """Return whether this build of torch has `onednn_product`, a non-public operator that torch.compile uses."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def activate_backward(da: Tensor, h: Tensor, activation: Activation) -> Tensor:
    """Return the gradient of h (n, H), given the gradient of its activation (n, F)."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da, h)
    gate, up = h.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(da * up, gate), da * F.silu(gate)], dim=-1)


def activate_backward_to_compile(da: Tensor, h: Tensor, activation: Activation) -> Tensor:
    """Return the same as `activate_backward`, sharing one exponential: slower in eager mode, twice as fast compiled."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da, h)
    wide = torch.promote_types(h.dtype, torch.float32)
    gate, up = h.to(wide).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    slope = da.to(wide) * sigmoid
    return torch.cat([slope * up * (1 + gate * (1 - sigmoid)), slope * gate], dim=-1).to(h.dtype)


class _FusedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows_per_expert: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        activation: Activation,
        parts: FusedParts,
    ) -> Tensor:
        groups = _groups(rows_per_expert.tolist())  # waits for the device
        w_in_c, w_out_c = w_in.to(x.dtype), w_out.to(x.dtype)
        xs = _split(x, groups, parts.rows_multiple)
        y = torch.empty_like(x)
        hs, activated = [], []
        for (e, rows), x_e in zip(groups, xs, strict=True):
            h = parts.product(x_e, w_in_c[e])  # (n, H)
            a = parts.activate(h, activation)  # (n, F)
            y[rows] = parts.product(a, w_out_c[e])[: rows.stop - rows.start]
            hs.append(h)
            activated.append(a)
        ctx.save_for_backward(w_in_c, w_out_c, *xs, *hs, *activated)
        ctx.groups, ctx.activation, ctx.parts, ctx.weight_dtype = groups, activation, parts, w_in.dtype
        return y

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None, None]:
        groups, parts, count = ctx.groups, ctx.parts, len(ctx.groups)
        w_in, w_out, *saved = ctx.saved_tensors
        xs, hs, activated = saved[:count], saved[count : 2 * count], saved[2 * count :]
        dx = torch.empty_like(grad_y)
        grad_w_in, grad_w_out = _gradient_like(w_in, groups), _gradient_like(w_out, groups)
        dys = _split(grad_y.contiguous(), groups, parts.rows_multiple)  # zero padding, which adds nothing below
        for (e, rows), x_e, h, a, dy in zip(groups, xs, hs, activated, dys, strict=True):
            da = parts.product(dy, w_out[e].T)  # (n, F)
            torch.mm(dy.T, a, out=grad_w_out[e])
            dh = parts.activate_backward(da, h, ctx.activation)  # (n, H)
            torch.mm(dh.T, x_e, out=grad_w_in[e])
            dx[rows] = parts.product(dh, w_in[e].T)[: rows.stop - rows.start]
        return dx, None, grad_w_in.to(ctx.weight_dtype), grad_w_out.to(ctx.weight_dtype), None, None


def _groups(rows_per_expert: list[int]) -> list[tuple[int, slice]]:
    """Return each expert that has rows, with their range."""
    ends = itertools.accumulate(rows_per_expert)
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(rows_per_expert, ends, strict=True)) if n]


def _split(x: Tensor, groups: list[tuple[int, slice]], multiple: int) -> list[Tensor]:
    """Return each group's rows of x (R, D), padded with zeros to the multiple.

    #  rows_per_expert 3 0 2, multiple 4     x   a a a | b b        split   a a a .   b b . .
    """
    if multiple == 1:
        return [x[rows] for _, rows in groups]
    return [F.pad(x[rows], (0, 0, 0, (rows.start - rows.stop) % multiple)) for _, rows in groups]


def _gradient_like(weight: Tensor, groups: list[tuple[int, slice]]) -> Tensor:
    """Return a buffer for a weight gradient, with zeros for the experts that no product writes to."""
    grad = torch.empty_like(weight)
    for e in set(range(len(weight))) - {e for e, _ in groups}:
        grad[e] = 0
    return grad
