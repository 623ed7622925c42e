"""Rotary position embedding (arXiv 2104.09864), in the rotate-half layout.

# S tokens, d head width, r <= d rotated width of a head.
"""

import torch
from torch import Tensor


def rotary_rates(width: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Return the angle per position of each pair, (width / 2,) float64 in radians, fastest first."""
    return theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)


def rotary_table(positions: Tensor, rates: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return (2, ..., S, r): scaled cosines and sines of the angles at positions (..., S), computed in float64."""
    angle = positions.double()[..., None] * rates  # (..., S, r/2)
    angle = torch.cat([angle, angle], dim=-1)
    table = torch.stack([angle.cos(), angle.sin()])
    return (table if scale == 1 else table * scale).to(dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate each pair (i, i + r/2) of x (..., S, d) by its position's angle; in the wider dtype.

    Values of a head beyond the width r of the table are left as they are.
    """
    cos, sin = rotary
    width = cos.shape[-1]
    first, rest = x[..., :width], x[..., width:]
    left, right = first.chunk(2, dim=-1)
    turned = first * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned, rest.to(turned.dtype)], dim=-1) if rest.shape[-1] else turned
