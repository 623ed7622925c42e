"""Rotary position embedding (arXiv 2104.09864), in the rotate-half layout.

# S tokens, d head width.
"""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Return (2, ..., S, head_dim): cosines and sines of the angles at positions (..., S), computed in float64."""
    rate = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim)
    angle = positions.double()[..., None] * rate  # (..., S, d/2)
    angle = torch.cat([angle, angle], dim=-1)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of x (..., S, d) by its position's angle; in the wider dtype."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
