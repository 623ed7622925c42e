"""The experts' feed-forward for the CPU: each expert runs both layers before the next one starts.

Intermediate results stay in the cache, and gradients of weights are written in place. On the CPU every new size of a
bfloat16 product builds a kernel first (2 to 4 ms, more than the product), while routing yields new sizes in every step:
group sizes are rounded up. What a product writes beyond its group is overwritten by the next group, so nothing is
copied:

#  rows_per_expert 3 2, multiple 4     expert 0 writes   a a a . | . . . .      expert 1   a a a b | b . . .

# R rows, n rows of one expert, np >= n rounded up, E experts, D d_model, F d_ff, H width before the activation.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.ffn_kernel import ExpertRows, FFNKernel, LayerWeights, RowGradients
from trainer.ops.low_rank import ExpertAdapters, LowRank, LowRankGradients
from trainer.ops.weighted_activation import WeightedActivation

ROWS_MULTIPLE = 64
"""Group sizes are rounded up to a multiple of this if the library (oneDNN) builds a kernel for every size."""


class Products:
    """Products by torch's default library: MKL for float32 on the CPU."""

    def rows(self, x: Tensor, w: Tensor, out: Tensor) -> None:
        """Write x (n, K) times w.T, given w (N, K) of any strides, to a contiguous (n, N)."""
        torch.mm(x, w.T, out=out)

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
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))

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

    def forward(self, rows: ExpertRows, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs and the hidden values."""
        h, y = self._buffer(rows, weights.w_in.shape[1]), self._buffer(rows, weights.w_out.shape[1])
        scale, low = self._extended(rows.scale), weights.adapters.of_rows(rows.x)
        w_in, w_out = weights.w_in.unbind(), weights.w_out.unbind()  # one operation, not one for each expert
        for e, group, (x,) in self._groups(rows, rows.x):
            hidden, out = h[group], y[group]
            self._first(x, w_in[e], weights, low, e, hidden)
            a = self.activation.apply(hidden, scale[group], self.activation.activation)  # (np, F)
            self.products.rows(a, w_out[e].to(x.dtype), out)
            self._add_low_rank(a, low.w_out, e, out)
        return y[: len(rows.scale)], h

    def hidden(self, rows: ExpertRows, weights: LayerWeights) -> Tensor:
        """Return the hidden values."""
        h, low = self._buffer(rows, weights.w_in.shape[1]), weights.adapters.of_rows(rows.x)
        w_in = weights.w_in.unbind()
        for e, group, (x,) in self._groups(rows, rows.x):
            self._first(x, w_in[e], weights, low, e, h[group])
        return h

    def _first(self, x: Tensor, w: Tensor, weights: LayerWeights, low: ExpertAdapters, e: int, out: Tensor) -> None:
        """Write the hidden values of one expert, whose matrix is w (H, D)."""
        self.products.rows(x, w.to(x.dtype), out)
        self._add_low_rank(x, low.w_in, e, out)
        if weights.bias is not None:
            out += weights.bias[e].to(x.dtype)

    def _add_low_rank(self, x: Tensor, low: LowRank | None, e: int, out: Tensor) -> None:
        """Add s (x A^T) B^T of one expert."""
        if low is not None:
            out += self._product(self._product(x, low.a[e]) * low.scale, low.b[e])

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        """Return x times w.T."""
        out = x.new_empty(len(x), len(w))
        self.products.rows(x, w, out)
        return out

    def backward(self, grad: Tensor, rows: ExpertRows, h: Tensor, weights: LayerWeights) -> RowGradients:
        """Return the gradients. Rows beyond a group have an output gradient of zeros, which adds nothing."""
        scale, num_rows, low = self._extended(rows.scale), len(rows.scale), weights.adapters.of_rows(rows.x)
        grads = _empty_gradients(weights, dx=self._buffer(rows, rows.x.shape[1]), d_scale=torch.empty_like(scale))
        sizes = rows.rows_per_expert.tolist()
        w_in, w_out = weights.w_in.mT.unbind(), weights.w_out.mT.unbind()
        for e, group, (x, dy) in self._groups(rows, rows.x, grad):
            if len(dy) > sizes[e]:
                dy[sizes[e] :].zero_()
            da = dy.new_empty(len(dy), weights.w_out.shape[2])
            v = self._input_gradient(dy, w_out[e], low.w_out, e, da)
            a, dh, d_scale = self.activation.gradients(da, h[group], scale[group], self.activation.activation)
            grads.scale[group] = d_scale
            self._weight_gradients(dy, a, e, grads.w_out)
            self._factor_gradients(dy, a, v, e, low.w_out, grads.adapter_out)
            self._weight_gradients(dh, x, e, grads.w_in)
            if grads.bias is not None:
                torch.sum(dh, 0, dtype=grads.bias.dtype, out=grads.bias[e])
            v = self._input_gradient(dh, w_in[e], low.w_in, e, grads.x[group])
            self._factor_gradients(dh, x, v, e, low.w_in, grads.adapter_in)
        for e, size in enumerate(sizes):
            if size == 0:
                for gradient in grads.of_weights():
                    gradient[e] = 0
        return replace(grads, x=grads.x[:num_rows], scale=grads.scale[:num_rows])

    def _input_gradient(self, dz: Tensor, w: Tensor, low: LowRank | None, e: int, out: Tensor) -> Tensor | None:
        """Write the gradient of one expert's rows x (n, K), given that of x W^T (n, N) and w = W^T; return s dz B."""
        self.products.rows(dz, w.to(dz.dtype), out)
        if low is None:
            return None
        v = self._product(dz, low.b[e].T) * low.scale
        out += self._product(v, low.a[e].T)
        return v

    def _weight_gradients(self, dz: Tensor, x: Tensor, e: int, out: Tensor | None) -> None:
        if out is not None:
            self.products.over_rows(dz, x, out[e])

    def _factor_gradients(
        self, dz: Tensor, x: Tensor, v: Tensor | None, e: int, low: LowRank | None, out: LowRankGradients | None
    ) -> None:
        if v is not None and low is not None and out is not None:
            self.products.over_rows(v, x, out.a[e])
            self.products.over_rows(dz, self._product(x, low.a[e]) * low.scale, out.b[e])

    def _groups(self, rows: ExpertRows, *of_tokens: Tensor) -> Iterator[tuple[int, slice, list[Tensor]]]:
        """Yield each expert that has rows, with their range, rounded up, and its rows of each of tokens (N, ...)."""
        tokens, start = self._extended(rows.token_of_row), 0
        for e, size in enumerate(rows.rows_per_expert.tolist()):  # waits for the device
            if size:
                group = slice(start, start + size + -size % self.rows_multiple)
                here = tokens[group]
                yield e, group, [x.index_select(0, here) for x in of_tokens]
            start += size

    def _buffer(self, rows: ExpertRows, width: int) -> Tensor:
        """Return memory for the rows and what is written beyond the last group."""
        return rows.x.new_empty(len(rows.scale) + self.rows_multiple - 1, width)

    def _extended(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, self.rows_multiple - 1)) if self.rows_multiple > 1 else values


def _empty_gradients(weights: LayerWeights, *, dx: Tensor, d_scale: Tensor) -> RowGradients:
    """Return memory for the gradients of what learns."""

    def of_factors(low: LowRank | None) -> LowRankGradients | None:
        return None if low is None else LowRankGradients(torch.empty_like(low.a), torch.empty_like(low.b))

    bias = weights.bias if weights.learns_bias else None
    return RowGradients(
        x=dx,
        scale=d_scale,
        w_in=torch.empty_like(weights.w_in) if weights.learns_in else None,
        w_out=torch.empty_like(weights.w_out) if weights.learns_out else None,
        bias=None if bias is None else torch.zeros_like(bias),
        adapter_in=of_factors(weights.adapters.w_in),
        adapter_out=of_factors(weights.adapters.w_out),
    )
