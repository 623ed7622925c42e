"""Experts' products of numbers in MXFP8, which are quantized along the dimension that a product sums over.

    product                         sums over    quantized along it
    h  = x W_in^T, y = a W_out^T    D, F         tokens and activations; rows of the weights
    da = dy W_out, dx = dh W_in     D, H         gradients; columns of the weights
    dW_in = dh^T x, dW_out = dy^T a rows         gradients, tokens and activations, 32 rows of one expert at a time

So each tensor is quantized twice, from the same numbers. Sums are float32 or wider. Weights stay what they are, and
are quantized anew for each product. In the last line, which rows share a scale depends on the layout, and with it the
bits of numbers below about 2^-14 of the largest of 32.

# R rows, E experts, K and N widths, M rows of an operand, B blocks of 32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.grouped_kernel import GroupedMM, GroupedProducts
from trainer.ops.mx_format import BLOCK, MXBlocks, quantize, scale_tiles

GROUP_ROWS = 128
"""On a GPU groups of rows are padded to this, so that no tile of scales is of two groups."""


class MXFP8Products(GroupedProducts):
    """Products by torch's scaled grouped product, on tensor cores of compute capability 10; rounded to bfloat16.

    Groups have multiples of 128 rows.
    """

    def __init__(self, rows_per_expert: Tensor, num_rows: int) -> None:
        """Prepare the ends of the groups."""
        super().__init__(rows_per_expert, num_rows)
        self.ends = rows_per_expert.cumsum(0).to(torch.int32)

    def rows(self, x: Tensor, w: Tensor) -> Tensor:
        """Multiply rows by their expert's matrix."""
        left, right = quantize(x), quantize(w.mT.contiguous())  # (R, K), (E, N, K)
        tiles = scale_tiles(left.scale)
        # Groups begin with a tile, so the tiles of each are together.
        scale = tiles.flatten().view(tiles.shape[0] * GROUP_ROWS, -1)
        return self._product(left, right, scale, scale_tiles(right.scale).flatten(1)).to(x.dtype)

    def weights(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the products over rows."""
        padding = (0, -len(left) % GROUP_ROWS)
        one, other = (quantize(F.pad(x.T, padding).contiguous()) for x in (left, right))  # (K, R), (N, R)
        out = self._product(one, other, self._scale_by_group(one.scale), self._scale_by_group(other.scale))
        return out.masked_fill_((self.rows_per_expert == 0)[:, None, None], 0)  # may not be written: pytorch#172439

    def sums(self, x: Tensor) -> Tensor:
        """Sum each expert's rows, which is no product and not quantized."""
        return GroupedMM(self.rows_per_expert, self.num_rows).sums(x)

    def _product(self, left: MXBlocks, right: MXBlocks, left_scale: Tensor, right_scale: Tensor) -> Tensor:
        """Return the products of left (M, K) and right (N, K) or (E, N, K), summed over K."""
        return F.scaled_grouped_mm(  # pyrefly: ignore[missing-attribute]
            left.values,
            right.values.mT,
            left_scale,
            F.ScalingType.BlockWise1x32,
            right_scale,
            F.ScalingType.BlockWise1x32,
            swizzle_a=F.SwizzleType.SWIZZLE_32_4_4,
            swizzle_b=F.SwizzleType.SWIZZLE_32_4_4,
            offs=self.ends,
            output_dtype=torch.bfloat16,
        )

    def _scale_by_group(self, scale: Tensor) -> Tensor:
        """Return scales (M, B) in tiles, those of the first group of rows first; waits for nothing.

        #  tiles of M 0 1, of B 0 | 1 2     (M, B) 00 10 | 01 02 11 12
        """
        tiles = scale_tiles(scale)
        height, width, size = tiles.shape
        ends = torch.cat([self.ends // GROUP_ROWS, self.ends.new_full((1,), width)])  # with what is in no group
        column = torch.arange(width, device=scale.device)
        group = torch.searchsorted(ends, column.to(ends.dtype), right=True)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])[group]
        place = torch.arange(height, device=scale.device)[:, None] * (ends[group] - starts) + column - starts
        place = (place + starts * height).long()  # (tiles of M, tiles of B)
        by_group = tiles.new_empty(height * width, size).view(torch.uint8)
        by_group[place.flatten()] = tiles.flatten(0, 1).view(torch.uint8)
        return by_group.view(torch.float8_e8m0fnu).view(height * GROUP_ROWS, -1)


class EmulatedMXFP8Products(GroupedProducts):
    """The same products on any device: quantized, dequantized, multiplied in float32 or wider; waits for the sizes.

    Groups have multiples of 32 rows.
    """

    def __init__(self, rows_per_expert: Tensor, num_rows: int) -> None:
        """Prepare the places of the groups."""
        super().__init__(rows_per_expert, num_rows)
        ends = rows_per_expert.cumsum(0)
        starts = ends - rows_per_expert
        self.groups = [slice(*group) for group in torch.stack([starts, ends], 1).tolist()]  # sizes become shapes

    def rows(self, x: Tensor, w: Tensor) -> Tensor:
        """Multiply rows by their expert's matrix; rows of no expert become zeros."""
        left, right = _rounded(x), _rounded(w.mT)  # (R, K), (E, N, K)
        out = left.new_zeros(len(x), w.shape[2])
        for group, matrix in zip(self.groups, right, strict=True):
            torch.mm(left[group], matrix.T, out=out[group])
        return out.to(x.dtype)

    def weights(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the products over rows."""
        padding = (0, -len(left) % BLOCK)
        one, other = (_rounded(F.pad(x.T, padding)) for x in (left, right))  # (K, R), (N, R)
        return torch.stack([one[:, group] @ other[:, group].T for group in self.groups])

    def sums(self, x: Tensor) -> Tensor:
        """Sum each expert's rows, not quantized."""
        return torch.stack(
            [x[group].sum(0, dtype=torch.promote_types(x.dtype, torch.float32)) for group in self.groups]
        )


def _rounded(x: Tensor) -> Tensor:
    """Round to MXFP8 along the last dimension, in at least float32."""
    return quantize(x).dequantized(torch.promote_types(x.dtype, torch.float32))
