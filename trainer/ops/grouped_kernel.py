"""The experts' feed-forward by products over all groups of rows at once: grouped, batched, or one after the other.

# R rows, E experts, K and N widths, M rows of the busiest expert, r rank of a low-rank addition.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.ffn_kernel import ExpertRows, FFNKernel, LayerWeights, RowGradients
from trainer.ops.low_rank import LowRank, LowRankGradients
from trainer.ops.weighted_activation import WeightedActivation

_FEWEST_COLUMNS = 8
"""Columns of a product that every kernel takes: 16 bytes in bfloat16."""


class GroupedProducts(ABC):
    """Products of each expert's rows with its own matrix."""

    rank_multiple: ClassVar[int] = 1
    """Ranks that its products take are multiples of this."""

    def __init__(self, rows_per_expert: Tensor, num_rows: int) -> None:
        """Prepare for groups of these sizes (E,), the first ones of R rows."""
        self.rows_per_expert, self.num_rows = rows_per_expert, num_rows

    @abstractmethod
    def rows(self, x: Tensor, w: Tensor) -> Tensor:
        """Multiply x (R, K) by w (E, K, N): (R, N)."""

    @abstractmethod
    def weights(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left_e^T right_e (E, K, N) of left (R, K) and right (R, N); zeros for an expert without rows."""

    def sums(self, x: Tensor) -> Tensor:
        """Sum each expert's rows of x (R, N): (E, N).

        As a product with ones: added in float32 or wider, and in the same order in every run.
        """
        return self.weights(x, x.new_ones(len(x), _FEWEST_COLUMNS))[..., 0]


class GroupedMM(GroupedProducts):
    """Products by torch's grouped matrix product, which waits for no sizes. Not for float64."""

    rank_multiple = 8
    """It takes rows of a multiple of 16 bytes."""

    def __init__(self, rows_per_expert: Tensor, num_rows: int) -> None:
        """Prepare the ends of the groups."""
        super().__init__(rows_per_expert, num_rows)
        self.ends = rows_per_expert.cumsum(0).to(torch.int32)

    def rows(self, x: Tensor, w: Tensor) -> Tensor:
        """Multiply rows by their expert's matrix."""
        return F.grouped_mm(x, w, offs=self.ends)

    def weights(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the products over rows."""
        out = F.grouped_mm(left.T, right, offs=self.ends)
        # Kernels may leave uninitialized memory for groups without rows, on Blackwell (pytorch#172439).
        idle = self.rows_per_expert == 0
        if out.device.type == "cpu" and not idle.any():  # on a GPU, checking would cost more than writing
            return out
        return out.masked_fill_(idle[:, None, None], 0)


class LoopProducts(GroupedProducts):
    """Products of one expert after the other, for any dtype; waits for the sizes."""

    def __init__(self, rows_per_expert: Tensor, num_rows: int) -> None:
        """Prepare the sizes of the groups."""
        super().__init__(rows_per_expert, num_rows)
        self.sizes = rows_per_expert.tolist()  # waits for the device: sizes become shapes

    def rows(self, x: Tensor, w: Tensor) -> Tensor:
        """Multiply rows by their expert's matrix."""
        return torch.cat([rows @ w[e] for e, rows in enumerate(x.split(self.sizes))])

    def weights(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the products over rows."""
        groups = zip(left.split(self.sizes), right.split(self.sizes), strict=True)
        return torch.stack([a.T @ b for a, b in groups])


class PaddedProducts(GroupedProducts):
    """Batched products over groups padded to the largest, (E, M, K): for uniform loads and many small experts."""

    def __init__(self, rows_per_expert: Tensor, num_rows: int) -> None:
        """Find the cell of each row in the padded groups."""
        super().__init__(rows_per_expert, num_rows)
        num_experts, self.width = len(rows_per_expert), int(rows_per_expert.max())  # waits for the device
        device = rows_per_expert.device
        start = rows_per_expert.cumsum(0) - rows_per_expert
        expert = torch.arange(num_experts, device=device).repeat_interleave(rows_per_expert, output_size=num_rows)
        self.cell = expert * self.width + torch.arange(num_rows, device=device) - start[expert]  # (R,)

    def rows(self, x: Tensor, w: Tensor) -> Tensor:
        """Multiply rows by their expert's matrix."""
        return torch.bmm(self._padded(x), w).flatten(0, 1).index_select(0, self.cell)

    def weights(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the products over rows."""
        return torch.bmm(self._padded(left).mT, self._padded(right))

    def _padded(self, x: Tensor) -> Tensor:
        groups = x.new_zeros(len(self.rows_per_expert) * self.width, x.shape[1]).index_copy_(0, self.cell, x)
        return groups.view(len(self.rows_per_expert), self.width, x.shape[1])


class GroupedKernel(FFNKernel):
    """Both layers of all experts, one product over all rows after the other."""

    def __init__(self, activation: WeightedActivation, products: Callable[[Tensor, int], GroupedProducts]) -> None:
        super().__init__(activation)
        self.products = products

    def forward(self, rows: ExpertRows, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs and the hidden values."""
        products = self.products(rows.rows_per_expert, len(rows.scale))
        h = _hidden(products, rows, weights)
        a = self.activation.apply(h, rows.scale, self.activation.activation)
        y = products.rows(a, weights.w_out.to(h.dtype).mT)
        return _with_low_rank(products, y, a, weights.adapters.w_out), h

    def hidden(self, rows: ExpertRows, weights: LayerWeights) -> Tensor:
        """Return the hidden values."""
        return _hidden(self.products(rows.rows_per_expert, len(rows.scale)), rows, weights)

    def backward(self, grad: Tensor, rows: ExpertRows, h: Tensor, weights: LayerWeights) -> RowGradients:
        """Return the gradients."""
        products = self.products(rows.rows_per_expert, len(rows.scale))
        w_in, w_out, given = weights.w_in, weights.w_out, weights.adapters
        low = given.of_rows(rows.x, multiple=products.rank_multiple)
        dy = grad.index_select(0, rows.token_of_row)  # (R, D)
        v_out = _narrow_gradient(products, dy, low.w_out)  # (R, r)
        da = _input_gradient(products, dy, w_out, low.w_out, v_out)  # (R, F)
        a, dh, d_scale = self.activation.gradients(da, h, rows.scale, self.activation.activation)
        del da
        grad_w_out = products.weights(dy, a).to(w_out.dtype) if weights.learns_out else None
        grad_low_out = _factor_gradients(products, dy, a, v_out, low.w_out, given.w_out)
        del dy, a
        grad_w_in = grad_low_in = None
        v_in = _narrow_gradient(products, dh, low.w_in)
        if weights.learns_in or low.w_in is not None:
            x = rows.x.index_select(0, rows.token_of_row)
            grad_w_in = products.weights(dh, x).to(w_in.dtype) if weights.learns_in else None
            grad_low_in = _factor_gradients(products, dh, x, v_in, low.w_in, given.w_in)
            del x
        bias = weights.bias if weights.learns_bias else None
        return RowGradients(
            x=_input_gradient(products, dh, w_in, low.w_in, v_in),
            scale=d_scale,
            w_in=grad_w_in,
            w_out=grad_w_out,
            bias=None if bias is None else products.sums(dh).to(bias.dtype),
            adapter_in=grad_low_in,
            adapter_out=grad_low_out,
        )


def _hidden(products: GroupedProducts, rows: ExpertRows, weights: LayerWeights) -> Tensor:
    """Return the hidden values (R, H)."""
    x = rows.x.index_select(0, rows.token_of_row)
    h = _with_low_rank(products, products.rows(x, weights.w_in.to(x.dtype).mT), x, weights.adapters.w_in)
    return h if weights.bias is None else h.add_(weights.bias.to(h.dtype).index_select(0, rows.expert_of_row))


def _with_low_rank(products: GroupedProducts, z: Tensor, x: Tensor, low: LowRank | None) -> Tensor:
    """Add s (x A^T) B^T to the products z (R, N) of rows x (R, K), in place."""
    if low is None:
        return z
    a, b, scale = low.of_rows(x, multiple=products.rank_multiple)
    return z.add_(products.rows(products.rows(x, a.mT).mul_(scale), b.mT))


def _narrow_gradient(products: GroupedProducts, dz: Tensor, low: LowRank | None) -> Tensor | None:
    """Return v = s dz B (R, r), the gradient of x A^T."""
    return None if low is None else products.rows(dz, low.b).mul_(low.scale)


def _input_gradient(products: GroupedProducts, dz: Tensor, w: Tensor, low: LowRank | None, v: Tensor | None) -> Tensor:
    """Return the gradient of the rows x (R, K) from that of their products z (R, N)."""
    dx = products.rows(dz, w.to(dz.dtype))
    if low is None or v is None:
        return dx
    return dx.add_(products.rows(v, low.a))


def _factor_gradients(
    products: GroupedProducts, dz: Tensor, x: Tensor, v: Tensor | None, low: LowRank | None, given: LowRank | None
) -> LowRankGradients | None:
    """Return the gradients of the factors that were given, of which `low` are the form for the products."""
    if low is None or given is None or v is None:
        return None
    rank, u = given.a.shape[1], products.rows(x, low.a.mT).mul_(low.scale)  # (R, r)
    da, db = products.weights(v, x)[:, :rank], products.weights(dz, u)[:, :, :rank]
    return LowRankGradients(da.to(given.a.dtype).contiguous(), db.to(given.b.dtype).contiguous())
