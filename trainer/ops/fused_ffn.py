"""The experts' feed-forward as one autograd node: weight gradients are written in place, group sizes are rounded up.

Plain autograd spends its time beside the products: the backward of `w[e]` makes a full-size tensor of zeros for every
expert and adds them up, `cat` and `split` copy, and on the CPU a bfloat16 product of a size not met before first builds a
kernel for it (2 to 4 ms, more than the product itself), while routing gives new sizes every step.

# R rows, Rp >= R rows with padding, E experts, D d_model, F d_ff, H width before the activation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.expert_ffn import Activation

_ROWS_MULTIPLE = {torch.bfloat16: 64}
"""Group sizes are rounded up to this in a dtype whose CPU kernels are built per size."""


def fused(x: Tensor, rows_per_expert: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation) -> Tensor:
    """One autograd node for all experts; arguments and result as in `expert_ffn`."""
    return _FusedFFN.apply(x, rows_per_expert, w_in, w_out, activation)


class _FusedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows_per_expert: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation
    ) -> Tensor:
        layout = _Layout(rows_per_expert.tolist(), _ROWS_MULTIPLE.get(x.dtype, 1))  # waits for the device
        w_in_c, w_out_c = w_in.to(x.dtype), w_out.to(x.dtype)
        xp = layout.pad(x)  # (Rp, D)
        h = x.new_empty(layout.num_rows, w_in.shape[1])  # (Rp, H)
        for e, rows in layout.groups:
            torch.mm(xp[rows], w_in_c[e].T, out=h[rows])
        a = _activation_forward(h, activation)  # (Rp, F)
        y = torch.empty_like(xp)
        for e, rows in layout.groups:
            torch.mm(a[rows], w_out_c[e].T, out=y[rows])
        ctx.save_for_backward(xp, h, a, w_in_c, w_out_c)
        ctx.layout, ctx.activation, ctx.weight_dtype = layout, activation, w_in.dtype
        return layout.unpad(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        xp, h, a, w_in, w_out = ctx.saved_tensors
        layout: _Layout = ctx.layout
        dy = layout.pad(grad_y.contiguous())  # (Rp, D); zeros in the padding, so it adds nothing below
        da = torch.empty_like(a)
        grad_w_out = _gradient_like(w_out, layout)
        for e, rows in layout.groups:
            torch.mm(dy[rows], w_out[e], out=da[rows])
            torch.mm(dy[rows].T, a[rows], out=grad_w_out[e])
        dh = _activation_backward(da, h, ctx.activation)  # (Rp, H)
        dx = torch.empty_like(xp)
        grad_w_in = _gradient_like(w_in, layout)
        for e, rows in layout.groups:
            torch.mm(dh[rows], w_in[e], out=dx[rows])
            torch.mm(dh[rows].T, xp[rows], out=grad_w_in[e])
        return layout.unpad(dx), None, grad_w_in.to(ctx.weight_dtype), grad_w_out.to(ctx.weight_dtype), None


class _Layout:
    """Where each expert's rows stand, without and with padding.

    #  rows_per_expert 3 0 2, multiple 4     x   a a a | b b        xp  a a a . | b b . .
    """

    def __init__(self, rows_per_expert: list[int], multiple: int) -> None:
        self.sizes = rows_per_expert
        self.padded_sizes = [-(-n // multiple) * multiple for n in rows_per_expert]
        self.num_rows = sum(self.padded_sizes)
        self.is_padded = self.padded_sizes != self.sizes
        self.groups: list[tuple[int, slice]] = []
        """(expert, its rows with padding), of experts that have any."""
        self.empty = [e for e, n in enumerate(rows_per_expert) if n == 0]
        start = 0
        for e, size in enumerate(self.padded_sizes):
            if size:
                self.groups.append((e, slice(start, start + size)))
            start += size

    def pad(self, x: Tensor) -> Tensor:
        """Copy (R, D) into (Rp, D), zeros in between."""
        if not self.is_padded:
            return x
        out = x.new_empty(self.num_rows, x.shape[1])
        source = target = 0
        for size, padded_size in zip(self.sizes, self.padded_sizes, strict=True):
            out[target : target + size] = x[source : source + size]
            out[target + size : target + padded_size] = 0
            source, target = source + size, target + padded_size
        return out

    def unpad(self, y: Tensor) -> Tensor:
        """Copy (Rp, D) into (R, D)."""
        if not self.is_padded:
            return y
        return torch.cat([y[rows.start : rows.start + self.sizes[e]] for e, rows in self.groups])


def _gradient_like(weight: Tensor, layout: _Layout) -> Tensor:
    """Return a buffer for a weight gradient: zeros where no product will write."""
    grad = torch.empty_like(weight)
    for e in layout.empty:
        grad[e] = 0
    return grad


def _activation_forward(h: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu":
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _activation_backward(da: Tensor, h: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da, h)
    gate, up = h.chunk(2, dim=-1)
    dh = torch.empty_like(h)
    d_gate, d_up = dh.chunk(2, dim=-1)
    torch.mul(da, F.silu(gate), out=d_up)
    torch.ops.aten.silu_backward.grad_input(da * up, gate, grad_input=d_gate)
    return dh
