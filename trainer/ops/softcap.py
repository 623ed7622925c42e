"""Soft limits of scores and logits (Gemma 2, arXiv 2408.00118)."""

import torch
from torch import Tensor


def softcapped(x: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(x / cap), which is almost x where it is small and never beyond the cap; None: x."""
    return x if cap is None else cap * torch.tanh(x / cap)
