"""Softmax and its normalizer, which save one tensor for the backward pass instead of two."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def softmax_and_log_norm(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax (T, E) of logits (T, E) over the last dimension, and their logsumexp (T,).

    The gradient of both needs the probabilities only; plain `logsumexp` would save the logits too.
    """
    return _SoftmaxAndLogNorm.apply(logits)


class _SoftmaxAndLogNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        probs = logits.softmax(-1)
        ctx.save_for_backward(probs)
        return probs, logits.logsumexp(-1)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_probs: Tensor, grad_log_norm: Tensor) -> Tensor:
        (probs,) = ctx.saved_tensors
        through_probs = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        return through_probs.addcmul_(grad_log_norm[:, None], probs)
