"""Normalization of the residual stream, queries and keys."""

import torch
from torch import Tensor, nn

from trainer.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., width); the result is in the weight's dtype."""
        return rms_norm(x, self.weight, self.eps)
