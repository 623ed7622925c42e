"""Diagnosis of a skipped step: which part of loss and gradient was not finite, and on which ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trainer.distributed.rank_layout import format_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Non-finite values found on one rank; sequences of findings are ordered by rank."""

    gradients: list[str]
    """Parameters whose reduced gradient is not finite, in the part held by this rank."""
    loss_is_finite: bool
    """This rank's share of the objective is finite."""
    dense_share_is_finite: bool
    """This rank's dense gradients were finite before the reduction; True if unknown."""
    expert_share_is_finite: bool
    """The local experts' gradients, which come from the tokens of all ranks, were finite before the reduction."""


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite."""
    return bool(tensor.isfinite().all())


def describe_findings(findings: Sequence[Findings], parameters: Sequence[str], *, grad_norm: float) -> str:
    """Return a description of what was not finite, and of the ranks that it came from.

    For example `the gradient of blocks.1.ffn.experts.w_in is not finite (loss not finite on rank 1)`.

    `parameters` are all names in the order of the forward pass: the first affected one is named, the others counted.
    """
    affected = {name for mine in findings for name in mine.gradients}
    names = [name for name in parameters if name in affected]
    lossy = [rank for rank, mine in enumerate(findings) if not mine.loss_is_finite]
    if len(names) > 1:
        what = f"the gradient of {names[0]} and {len(names) - 1} more parameter{'s' * (len(names) > 2)} is not finite"
    elif names:
        what = f"the gradient of {names[0]} is not finite"
    elif lossy:
        what = "the loss is not finite, though the gradient is"
    else:
        what = f"the gradient norm is {grad_norm}, though every element is finite"
    return f"{what} ({_origin(findings, lossy)})"


def _origin(findings: Sequence[Findings], lossy: Sequence[int]) -> str:
    if len(findings) == 1:
        return "loss not finite" if lossy else "loss finite"
    if lossy:
        return f"loss not finite on {format_ranks(lossy)}"
    # A rank computes its dense gradients alone; those of its experts come from the tokens of all ranks.
    dense = [rank for rank, mine in enumerate(findings) if not mine.dense_share_is_finite]
    ranks = dense or [rank for rank, mine in enumerate(findings) if not mine.expert_share_is_finite]
    return "loss finite on every rank" + (f"; it came from {format_ranks(ranks)}" if ranks else "")
