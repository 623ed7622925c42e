"""Normalization of the residual stream, queries and keys."""

import torch
from torch import Tensor, nn

from trainer.models.config import NORM_START, Norm
from trainer.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, computed in at least float32.

    The result is multiplied by the weight, which starts at 1, or by 1 + weight, which starts at 0 (Gemma).
    """

    def __init__(self, width: int, eps: float, kind: Norm = "rms") -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((width,), NORM_START[kind])), eps
        self.adds_one = kind == "rms_plus_one"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., width); the result is in the weight's dtype."""
        return rms_norm(x, self.weight + 1 if self.adds_one else self.weight, self.eps)
