"""The experts' feed-forward by products over all groups of rows at once: grouped, batched, or one after the other.

# R rows, E experts, K and N widths, M rows of the busiest expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.routed_ffn import ExpertRows, FFNKernel, RowGradients
from trainer.ops.weighted_activation import WeightedActivation

_FEWEST_COLUMNS = 8
"""Columns of a product that every kernel takes: 16 bytes in bfloat16."""


class GroupedProducts(ABC):
    """Products of each expert's rows with its own matrix."""

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

    def forward(self, rows: ExpertRows, w_in: Tensor, w_out: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs and the hidden values."""
        products = self.products(rows.rows_per_expert, len(rows.scale))
        h = _hidden(products, rows, w_in, bias)
        a = self.activation.apply(h, rows.scale, self.activation.activation)
        return products.rows(a, w_out.to(h.dtype).mT), h

    def hidden(self, rows: ExpertRows, w_in: Tensor, bias: Tensor | None) -> Tensor:
        """Return the hidden values."""
        return _hidden(self.products(rows.rows_per_expert, len(rows.scale)), rows, w_in, bias)

    def backward(
        self, grad: Tensor, rows: ExpertRows, h: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None
    ) -> RowGradients:
        """Return the gradients."""
        products = self.products(rows.rows_per_expert, len(rows.scale))
        dy = grad.index_select(0, rows.token_of_row)  # (R, D)
        da = products.rows(dy, w_out.to(dy.dtype))  # (R, F)
        a, dh, d_scale = self.activation.gradients(da, h, rows.scale, self.activation.activation)
        del da
        grad_w_out = products.weights(dy, a).to(w_out.dtype)
        del dy, a
        grad_w_in = products.weights(dh, rows.x.index_select(0, rows.token_of_row)).to(w_in.dtype)
        grad_bias = None if bias is None else products.sums(dh).to(bias.dtype)
        dx = products.rows(dh, w_in.to(dh.dtype))
        return RowGradients(x=dx, scale=d_scale, w_in=grad_w_in, w_out=grad_w_out, bias=grad_bias)


def _hidden(products: GroupedProducts, rows: ExpertRows, w_in: Tensor, bias: Tensor | None) -> Tensor:
    """Return the hidden values (R, H)."""
    h = products.rows(rows.x.index_select(0, rows.token_of_row), w_in.to(rows.x.dtype).mT)
    return h if bias is None else h.add_(bias.to(h.dtype).index_select(0, rows.expert_of_row))
