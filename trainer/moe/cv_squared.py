"""The squared coefficient of variation over experts, of sums that are spread over ranks and micro-batches.

# B sequences, E experts.
"""

from typing import Literal

import torch
from torch import Tensor


def cv_squared(sums: Tensor) -> Tensor:
    """Return (...): variance over squared mean of sums (..., E), 0 when even; 0 too where everything is 0.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eqs. 7 and 11, with the population variance.
    """
    mean = sums.mean(-1)
    variance = sums.var(-1, correction=0)
    return torch.where(mean > 0, variance / mean.where(mean > 0, 1).square(), 0)


def cv_squared_loss(
    own: Tensor,
    tokens: Tensor,
    *,
    scope: Literal["sequence", "global_batch"],
    known: Tensor | None,
    routed_tokens: int,
) -> Tensor:
    """Return one layer's share of the loss, times N_g: shares of a step add up to N_g * CV^2, and so do gradients.

    Over the global batch the loss is CV^2 of a sum over micro-batches and ranks, which is not a sum of theirs. With the
    sum S of the step known, each adds

        (tokens here) * CV^2(S) + N_g * sum_e dCV^2/dS_e (S) * (own_e - own_e without gradient)

    whose values add up to N_g * CV^2(S), and whose gradients to that of it.

    Args:
        own: (B, E) sums of this micro-batch's rows, with gradient.
        tokens: (B,) of each row.
        scope: over which tokens a variation is taken.
        known: (E,) sums of the whole step; None: this micro-batch is the whole step.
        routed_tokens: N_g.
    """
    if scope == "sequence":
        return (cv_squared(own) * tokens).sum()
    here = own.sum(0)  # (E,)
    whole = (here if known is None else known).detach().requires_grad_()
    with torch.enable_grad():
        value = cv_squared(whole)
        (slope,) = torch.autograd.grad(value, whole)
    return tokens.sum() * value.detach() + routed_tokens * (slope * (here - here.detach())).sum()
