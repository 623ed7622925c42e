"""Diagnose a skipped step: which part of loss and gradient was not finite, and on which ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trainer.distributed.rank_layout import format_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Findings of one rank; rank r's is number r of a sequence of them."""

    gradients: list[str]
    """Parameters whose summed gradient, as far as it is here, is not finite."""
    loss_is_finite: bool
    """This rank's own share of the objective."""
    dense_share_is_finite: bool
    """This rank's own share of the dense gradients, before ranks were summed; True where it is not known."""
    expert_share_is_finite: bool
    """True if the local experts' gradient, which comes from all ranks' tokens, is finite."""


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every number is."""
    return bool(tensor.isfinite().all())


def in_words(everyone: Sequence[Findings], parameters: Sequence[str], *, grad_norm: float) -> str:
    """Return what was not finite and where it came from.

    For example `the gradient of blocks.1.ffn.experts.w_in is not finite (loss not finite on rank 1)`.

    Args:
        everyone: the findings of all ranks.
        parameters: all names, in the order of the forward pass: the first one is named, the others are counted.
        grad_norm: of the step.
    """
    found = {name for mine in everyone for name in mine.gradients}
    names = [name for name in parameters if name in found]
    lossy = [rank for rank, mine in enumerate(everyone) if not mine.loss_is_finite]
    if len(names) > 1:
        what = f"the gradient of {names[0]} and {len(names) - 1} more parameter{'s' * (len(names) > 2)} is not finite"
    elif names:
        what = f"the gradient of {names[0]} is not finite"
    elif lossy:
        what = "the loss is not finite, though the gradient is"
    else:
        what = f"the gradient's norm is {grad_norm}, though each number of it is finite"
    return f"{what} ({_origin(everyone, lossy)})"


def _origin(everyone: Sequence[Findings], lossy: Sequence[int]) -> str:
    if len(everyone) == 1:
        return "loss not finite" if lossy else "loss finite"
    if lossy:
        return f"loss not finite on {format_ranks(lossy)}"
    # A dense share is made on its rank alone; the experts' are what all ranks' tokens brought.
    dense = [rank for rank, mine in enumerate(everyone) if not mine.dense_share_is_finite]
    ranks = dense or [rank for rank, mine in enumerate(everyone) if not mine.expert_share_is_finite]
    return "loss finite on every rank" + (f"; it came from {format_ranks(ranks)}" if ranks else "")
