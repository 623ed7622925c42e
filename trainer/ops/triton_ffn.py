"""The experts' feed-forward by Triton: gathers, activation and combine weight inside the products.

Forward in two kernels, backward in four: no gathered copy of tokens or of output gradients exists, and gradients of
weights are written once, unrounded, in the weights' dtype. Nothing waits for the sizes of the groups: as many tiles are
launched as any sizes can need, and a map from tile to expert is made on the device. Float32 and bfloat16.

Tiles are those of Hopper's tensor cores (64 or 128 wide). For the CPU there is only Triton's interpreter, which tests
use: TRITON_INTERPRET=1.

# N tokens, R rows, E experts, T tiles of rows, D d_model, F d_ff, H width before the activation.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from trainer.ops import triton_kernels
from trainer.ops.activations import ClampedSwiGLU
from trainer.ops.ffn_kernel import ExpertRows, FFNKernel, LayerWeights, RowGradients
from trainer.ops.row_tiles import RowTiles

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of the products."""
IS_INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on any device; Triton reads it when it is imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """Sizes of a program's tile, and how it is launched."""

    rows: int
    columns: int
    depth: int
    """Depth of one step of the sum."""
    warps: int
    stages: int = 3
    """Steps of the sum in flight; with these sizes 96 KiB of a Hopper's 227 KiB at most."""

    @classmethod
    def of(cls, rows: int, dtype: torch.dtype, *, is_wide: bool = True) -> "TileShape":
        """Return the shape with this many rows; not wide where a program holds several tiles in registers."""
        return cls(
            rows=rows,
            columns=128 if is_wide else 64,
            depth=128 // dtype.itemsize,  # 128 bytes, the widest swizzle of shared memory
            warps=rows // 16,
        )

    def options(self) -> dict[str, Any]:
        """Return the arguments of a launch."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_DEPTH": self.depth,
            "INTERPRETED": IS_INTERPRETED,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class TritonKernel(FFNKernel):
    """Both layers of all experts, each product one kernel with all that comes before and after it."""

    def forward(self, rows: ExpertRows, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        """Return the weighted outputs and the hidden values."""
        tiles = _row_tiles(rows)
        h, a = self._first_product(rows, weights, tiles, is_forward=True)
        return _rows_product(a, weights.w_out.to(a.dtype).mT, tiles), h

    def hidden(self, rows: ExpertRows, weights: LayerWeights) -> Tensor:
        """Return the hidden values."""
        return self._first_product(rows, weights, _row_tiles(rows), is_forward=False)[0]

    def backward(self, grad: Tensor, rows: ExpertRows, h: Tensor, weights: LayerWeights) -> RowGradients:
        """Return the gradients."""
        tiles, w_in, w_out = _row_tiles(rows), weights.w_in, weights.w_out
        a, dh, d_scale = self._hidden_gradient(grad, rows, h, w_out, tiles)
        grad_w_in = grad_w_out = grad_bias = None
        if weights.learns_out:
            grad_w_out = _weights_product(grad, a, rows, w_out.dtype, gathers_left=True)
        del a
        if weights.bias is not None and weights.learns_bias:  # sums over rows, as a product with a column of ones
            ones = rows.x.new_ones(len(rows.x), 1)
            grad_bias = _weights_product(dh, ones, rows, weights.bias.dtype, gathers_left=False)[..., 0]
        if weights.learns_in:
            grad_w_in = _weights_product(dh, rows.x.contiguous(), rows, w_in.dtype, gathers_left=False)
        dx = _rows_product(dh, w_in.to(dh.dtype), tiles)
        return RowGradients(x=dx, scale=d_scale, w_in=grad_w_in, w_out=grad_w_out, bias=grad_bias)

    @property
    def _is_gated(self) -> bool:
        return self.activation.activation != "gelu"

    @property
    def _flags(self) -> dict[str, Any]:
        """Constants of the kernels that apply the activation; a limit of 0 is none."""
        activation = self.activation.activation
        clamped = activation if isinstance(activation, ClampedSwiGLU) else ClampedSwiGLU(1.0, 0.0)
        return {"GATED": self._is_gated, "ALPHA": clamped.alpha, "LIMIT": clamped.limit}

    def _first_product(
        self, rows: ExpertRows, weights: LayerWeights, tiles: RowTiles, *, is_forward: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden values and, if `is_forward`, their weighted activation."""
        w_in, bias = weights.w_in, weights.bias
        x, num_rows, width = rows.x.contiguous(), len(rows.scale), w_in.shape[1]
        if x.dtype not in DTYPES:
            raise TypeError(f"the experts' kernel triton computes in float32 or bfloat16, not {x.dtype}; use loop")
        d_ff = width // 2 if self._is_gated else width
        shape = TileShape.of(tiles.size, x.dtype, is_wide=not self._is_gated)
        h = x.new_empty(num_rows, width)
        a = x.new_empty(num_rows, d_ff) if is_forward else h
        with torch.cuda.device_of(x):
            triton_kernels.first_product[tiles.programs(d_ff, shape.columns)](
                *(x, rows.token_of_row, rows.scale, w_in.to(x.dtype).contiguous()),
                *(x if bias is None else bias.to(x.dtype).contiguous(), h, a),
                *(tiles.map, tiles.map.shape[1], x.shape[1], d_ff),
                HAS_BIAS=bias is not None,
                WRITE_A=is_forward,
                **self._flags,
                **shape.options(),
            )
        return h, a

    def _hidden_gradient(
        self, grad: Tensor, rows: ExpertRows, h: Tensor, w_out: Tensor, tiles: RowTiles
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted activation, and the gradients of the hidden values and of the combine weights."""
        num_rows, d_ff = len(rows.scale), w_out.shape[2]
        shape = TileShape.of(tiles.size, h.dtype, is_wide=False)
        a, dh = h.new_empty(num_rows, d_ff), torch.empty_like(h)
        d_scale = h.new_empty(triton.cdiv(d_ff, shape.columns), num_rows, dtype=torch.float32)
        with torch.cuda.device_of(h):
            triton_kernels.hidden_gradient[tiles.programs(d_ff, shape.columns)](
                *(grad, rows.token_of_row, rows.scale, w_out.to(h.dtype).contiguous(), h, a, dh, d_scale),
                *(tiles.map, tiles.map.shape[1], num_rows, grad.shape[1], d_ff),
                **self._flags,
                **shape.options(),
            )
        return a, dh, d_scale.sum(0).to(rows.scale.dtype)


def _row_tiles(rows: ExpertRows) -> RowTiles:
    num_rows, num_experts = len(rows.scale), len(rows.rows_per_expert)
    return RowTiles.of(rows.rows_per_expert, num_rows, 128 if num_rows >= 128 * num_experts else 64)


def _rows_product(x: Tensor, w: Tensor, tiles: RowTiles) -> Tensor:
    """Multiply x (R, K) by w (E, K, N): (R, N)."""
    width, shape = w.shape[2], TileShape.of(tiles.size, x.dtype)
    y = x.new_empty(len(x), width)
    with torch.cuda.device_of(x):
        triton_kernels.rows_product[tiles.programs(width, shape.columns)](
            *(x, w, y, tiles.map, tiles.map.shape[1], x.shape[1], width, *w.stride()), **shape.options()
        )
    return y


def _weights_product(
    left: Tensor, right: Tensor, rows: ExpertRows, dtype: torch.dtype, *, gathers_left: bool
) -> Tensor:
    """Return left_e^T right_e (E, K, N) of left (R, K) and right (R, N), one of which has a row for each token."""
    shape, num_experts = TileShape.of(128, left.dtype), len(rows.rows_per_expert)
    out = left.new_empty(num_experts, left.shape[1], right.shape[1], dtype=dtype)
    blocks = triton.cdiv(left.shape[1], shape.rows) * triton.cdiv(right.shape[1], shape.columns)
    with torch.cuda.device_of(left):
        triton_kernels.weights_product[(num_experts * blocks,)](
            *(left, right, rows.token_of_row, rows.rows_per_expert.cumsum(0), rows.rows_per_expert, out),
            *(left.shape[1], right.shape[1]),
            GATHER_LEFT=gathers_left,
            INTERPRETED=IS_INTERPRETED,
            BLOCK_LEFT=shape.rows,
            BLOCK_RIGHT=shape.columns,
            BLOCK_ROWS=shape.depth,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return out
