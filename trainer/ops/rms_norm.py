"""RMSNorm (arXiv 1910.07467) as one autograd node.

Plain autograd saves the normalized copy beside the input, and takes 1.7 times as long on the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.ops.first_derivative import only_first_derivative


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide x (..., width) by its root mean square and multiply by weight (width,); in the weight's dtype."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(weight.dtype)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight)

    @staticmethod
    @only_first_derivative
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(weight.dtype) * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        # d/dx of x * scale: what is along x does not change the result.
        grad_normed = grad * weight
        along = (grad_normed * normed).mean(-1, keepdim=True)
        return grad_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None
