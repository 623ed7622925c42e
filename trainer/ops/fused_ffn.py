"""The experts' feed-forward for the CPU: each expert runs both layers before the next one starts.

Intermediate results stay in the cache, and gradients of weights are written in place. On the CPU every new size of a
bfloat16 product builds a kernel first (2 to 4 ms, more than the product), while routing yields new sizes in every step:
group sizes are rounded up. What a product writes beyond its group is overwritten by the next group, so nothing is
copied:

#  rows_per_expert 3 2, multiple 4     expert 0 writes   a a a . | . . . .      expert 1   a a a b | b . . .

# R rows, n rows of one expert, np >= n rounded up, E experts, D d_model, F d_ff, H width before the activation.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.routed_ffn import ExpertRows, FFNKernel, RowGradients
from trainer.ops.weighted_activation import WeightedActivation

ROWS_MULTIPLE = 64
"""Group sizes are rounded up to a multiple of this if the library (oneDNN) builds a kernel for every size."""


class Products:
    """Products by torch's default library: MKL for float32 on the CPU."""

    def rows(self, x: Tensor, w: Tensor, out: Tensor) -> None:
        """Write x (n, K) times w (K, N), of any strides, to a contiguous (n, N)."""
        torch.mm(x, w, out=out)

    def over_rows(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write left.T (K, n) times right (n, N), in the dtype of the weights, which may be wider."""
        if out.dtype is left.dtype:
            torch.mm(left.T, right, out=out)
        else:
            out.copy_(left.T @ right)


class OneDNNProducts(Products):
    """Products of float32 by oneDNN on the CPU; on AMD processors MKL takes 1.2 to 2.2 times as long."""

    def rows(self, x: Tensor, w: Tensor, out: Tensor) -> None:
        """Write a product."""
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, w.T, None, "none", [], ""))

    def over_rows(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write a product over rows."""
        out.copy_(torch.ops.mkldnn._linear_pointwise(left.T, right.T, None, "none", [], ""))


def has_onednn_product() -> bool:
    """Return whether this build of torch has the product of oneDNN, a non-public operator that torch.compile uses."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FusedKernel(FFNKernel):
    """Both layers of one expert after the other."""

    def __init__(self, activation: WeightedActivation, products: Products, rows_multiple: int) -> None:
        """Create the kernel; group sizes are rounded up to `rows_multiple`."""
        super().__init__(activation)
        self.products, self.rows_multiple = products, rows_multiple

    def forward(self, rows: ExpertRows, w_in: Tensor, w_out: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs and the hidden values."""
        h, y = self._buffer(rows, w_in.shape[1]), self._buffer(rows, w_out.shape[1])
        scale = self._extended(rows.scale)
        for e, group, x in self._groups(rows, rows.x):
            self._first(x, w_in[e], None if bias is None else bias[e], h[group])
            a = self.activation.apply(h[group], scale[group], self.activation.activation)  # (np, F)
            self.products.rows(a, w_out[e].to(x.dtype).T, y[group])
        return y[: len(rows.scale)], h

    def hidden(self, rows: ExpertRows, w_in: Tensor, bias: Tensor | None) -> Tensor:
        """Return the hidden values."""
        h = self._buffer(rows, w_in.shape[1])
        for e, group, x in self._groups(rows, rows.x):
            self._first(x, w_in[e], None if bias is None else bias[e], h[group])
        return h

    def _first(self, x: Tensor, w_in: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write the hidden values of one expert."""
        self.products.rows(x, w_in.to(x.dtype).T, out)
        if bias is not None:
            out += bias.to(x.dtype)

    def backward(
        self, grad: Tensor, rows: ExpertRows, h: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None
    ) -> RowGradients:
        """Return the gradients. Rows beyond a group have an output gradient of zeros, which adds nothing."""
        dx, scale = self._buffer(rows, rows.x.shape[1]), self._extended(rows.scale)
        d_scale = torch.empty_like(scale)
        grad_w_in, grad_w_out = torch.empty_like(w_in), torch.empty_like(w_out)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        sizes = rows.rows_per_expert.tolist()
        for (e, group, x), (_, _, dy) in zip(self._groups(rows, rows.x), self._groups(rows, grad), strict=True):
            dy[sizes[e] :] = 0
            da = dy.new_empty(len(dy), w_out.shape[2])
            self.products.rows(dy, w_out[e].to(x.dtype), da)
            a, dh, d_scale[group] = self.activation.gradients(da, h[group], scale[group], self.activation.activation)
            self.products.over_rows(dy, a, grad_w_out[e])
            self.products.over_rows(dh, x, grad_w_in[e])
            if grad_bias is not None:
                torch.sum(dh, 0, dtype=grad_bias.dtype, out=grad_bias[e])
            self.products.rows(dh, w_in[e].to(x.dtype), dx[group])
        for e, size in enumerate(sizes):
            if size == 0:
                grad_w_in[e] = grad_w_out[e] = 0
        num_rows = len(rows.scale)
        return RowGradients(x=dx[:num_rows], scale=d_scale[:num_rows], w_in=grad_w_in, w_out=grad_w_out, bias=grad_bias)

    def _groups(self, rows: ExpertRows, x: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield each expert that has rows, with their range, rounded up, and its rows of tokens x (N, ...)."""
        tokens, start = self._extended(rows.token_of_row), 0
        for e, size in enumerate(rows.rows_per_expert.tolist()):  # waits for the device
            if size:
                group = slice(start, start + size + -size % self.rows_multiple)
                yield e, group, x.index_select(0, tokens[group])
            start += size

    def _buffer(self, rows: ExpertRows, width: int) -> Tensor:
        """Return memory for the rows and what is written beyond the last group."""
        return rows.x.new_empty(len(rows.scale) + self.rows_multiple - 1, width)

    def _extended(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, self.rows_multiple - 1)) if self.rows_multiple > 1 else values
