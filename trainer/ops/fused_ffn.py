"""The experts' feed-forward for the CPU: each expert runs both layers before the next one starts.

Intermediate results stay in the cache, and gradients of weights are written in place. On the CPU every new size of a
bfloat16 product builds a kernel first (2 to 4 ms, more than the product), while routing yields new sizes in every step:
group sizes are rounded up.

# R rows, n rows of one expert, np >= n with padding, E experts, D d_model, F d_ff, H width before the activation.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.routed_ffn import ExpertRows, FFNKernel, RowGradients
from trainer.ops.weighted_activation import WeightedActivation

ROWS_MULTIPLE = 64
"""Group sizes are rounded up to a multiple of this if the library (oneDNN) builds a kernel for every size."""


def product(x: Tensor, w: Tensor) -> Tensor:
    """Multiply x (n, K) by w (N, K) by torch's default library: MKL for float32 on the CPU."""
    return x @ w.T


def onednn_product(x: Tensor, w: Tensor) -> Tensor:
    """Multiply float32 by oneDNN on the CPU; on AMD processors MKL takes 1.2 to 1.4 times as long."""
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def has_onednn_product() -> bool:
    """Return whether this build of torch has `onednn_product`, a non-public operator that torch.compile uses."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FusedKernel(FFNKernel):
    """Both layers of one expert after the other."""

    def __init__(
        self, activation: WeightedActivation, product: Callable[[Tensor, Tensor], Tensor], rows_multiple: int
    ) -> None:
        """Create the kernel.

        Args:
            activation: between the two products.
            product: x (n, K), w (N, K) with any strides -> x @ w.T (n, N).
            rows_multiple: that group sizes are rounded up to.
        """
        super().__init__(activation)
        self.product, self.rows_multiple = product, rows_multiple

    def forward(self, rows: ExpertRows, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs and the hidden values."""
        hidden = rows.x.new_empty(len(rows.scale), w_in.shape[1])
        y = rows.x.new_empty(len(rows.scale), rows.x.shape[1])
        for e, group in _groups(rows):
            h = self.product(self._gather(rows.x, rows.token_of_row[group]), w_in[e])  # (np, H)
            a = self.activation.apply(h, self._pad(rows.scale[group]), self.activation.activation)  # (np, F)
            n = group.stop - group.start
            y[group] = self.product(a, w_out[e])[:n]
            hidden[group] = h[:n]
        return y, hidden

    def hidden(self, rows: ExpertRows, w_in: Tensor) -> Tensor:
        """Return the hidden values."""
        hidden = rows.x.new_empty(len(rows.scale), w_in.shape[1])
        for e, group in _groups(rows):
            h = self.product(self._gather(rows.x, rows.token_of_row[group]), w_in[e])
            hidden[group] = h[: group.stop - group.start]
        return hidden

    def backward(self, grad: Tensor, rows: ExpertRows, h: Tensor, w_in: Tensor, w_out: Tensor) -> RowGradients:
        """Return the gradients. Padding is zeros, which add nothing."""
        groups = _groups(rows)
        dx = grad.new_empty(len(rows.scale), grad.shape[1])
        d_scale = torch.empty_like(rows.scale)
        grad_w_in, grad_w_out = _gradient_like(w_in, groups), _gradient_like(w_out, groups)
        for e, group in groups:
            n, tokens = group.stop - group.start, rows.token_of_row[group]
            dy = self._gather(grad, tokens)  # (np, D)
            da = self.product(dy, w_out[e].T)  # (np, F)
            a, dh, ds = self.activation.gradients(
                da, self._pad(h[group]), self._pad(rows.scale[group]), self.activation.activation
            )
            torch.mm(dy.T, a, out=grad_w_out[e])
            torch.mm(dh.T, self._gather(rows.x, tokens), out=grad_w_in[e])
            dx[group] = self.product(dh, w_in[e].T)[:n]
            d_scale[group] = ds[:n]
        return RowGradients(x=dx, scale=d_scale, w_in=grad_w_in, w_out=grad_w_out)

    def _gather(self, x: Tensor, index: Tensor) -> Tensor:
        """Return rows of x by index (n,), padded with zeros to the multiple."""
        padding = -len(index) % self.rows_multiple
        if padding == 0:
            return x.index_select(0, index)
        out = x.new_empty(len(index) + padding, x.shape[1])
        torch.index_select(x, 0, index, out=out[: len(index)])
        out[len(index) :] = 0
        return out

    def _pad(self, x: Tensor) -> Tensor:
        padding = -len(x) % self.rows_multiple
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, padding)) if padding else x


def _groups(rows: ExpertRows) -> list[tuple[int, slice]]:
    """Return each expert that has rows, with their range."""
    sizes = rows.rows_per_expert.tolist()  # waits for the device
    ends = itertools.accumulate(sizes)
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(sizes, ends, strict=True)) if n]


def _gradient_like(weight: Tensor, groups: list[tuple[int, slice]]) -> Tensor:
    """Return a buffer for a weight gradient, with zeros for the experts that no product writes to."""
    grad = torch.empty_like(weight)
    for e in set(range(len(weight))) - {e for e, _ in groups}:
        grad[e] = 0
    return grad
