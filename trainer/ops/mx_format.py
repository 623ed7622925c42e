"""The microscaling format MXFP8: blocks of 32 float8 numbers that share a scale, a power of two.

Numbers have 4 exponent and 3 mantissa bits (e4m3), forward and backward, and the scale has 8 exponent bits (E8M0). It
is the smallest power of two under which the largest number of the block fits, so nothing saturates and the largest
keeps at least half of the range. A block with a number that is not finite is NaN, all of it.

Source: OCP Microscaling Formats 1.0; the scale is rounded up instead of down, as in arXiv 2506.08027.

# K width, B blocks = K / 32, M rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
"""Numbers that share a scale."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_BIAS = 127
"""Bias of the scale's exponent; a scale is between 2^-127 and 2^127."""
_NAN = 255
"""The scale that is not a number."""
_TILE_ROWS, _TILE_COLUMNS, _TILE_STRIDE = 128, 4, 32
"""Shape of the tiles in which tensor cores read scales, and the distance of the rows whose scales are neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MXBlocks:
    """A tensor in MXFP8, quantized along its last dimension."""

    values: Tensor
    """(..., K) float8_e4m3fn."""
    scale: Tensor
    """(..., B) float8_e8m0fnu."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers (..., K), which bfloat16 and anything wider represents exactly."""
        blocks = self.values.to(dtype).unflatten(-1, (-1, BLOCK))
        return (blocks * self.scale.to(dtype)[..., None]).flatten(-2)


def quantize(x: Tensor) -> MXBlocks:
    """Quantize x (..., K) along its last dimension, a multiple of 32."""
    blocks = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest / _LARGEST)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # the logarithm, rounded up; mantissas begin at 0.5
    exponent = exponent.clamp(-_BIAS, _BIAS).masked_fill(~largest.isfinite(), _NAN - _BIAS)
    values = torch.ldexp(blocks, -exponent).to(torch.float8_e4m3fn)
    scale = (exponent.squeeze(-1) + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)
    return MXBlocks(values=values.flatten(-2), scale=scale)


def scale_tiles(scale: Tensor) -> Tensor:
    """Return scales (..., M, B) as the tiles (..., tiles of rows, tiles of blocks, 512) that tensor cores read.

    A tile has 128 rows and 4 columns; row r and column c are at 16 (r mod 32) + 4 (r div 32) + c. The last tiles are
    padded with zeros.

    Source: NVIDIA's cuBLAS documentation, layout of scaling factors of 1D blocks.
    """
    padding = (0, -scale.shape[-1] % _TILE_COLUMNS, 0, -scale.shape[-2] % _TILE_ROWS)
    padded = F.pad(scale.view(torch.uint8), padding)
    tiles = padded.unflatten(-1, (-1, _TILE_COLUMNS)).unflatten(-3, (-1, _TILE_ROWS // _TILE_STRIDE, _TILE_STRIDE))
    # (..., tile of rows, r div 32, r mod 32, tile of blocks, c) -> (..., tile of rows, tile of blocks, mod, div, c)
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-3).view(torch.float8_e8m0fnu)
