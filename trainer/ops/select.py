"""Selection with a defined answer where scores are equal."""

import torch
from torch import Tensor

_STEPS = 4096


def first_top_k(scores: Tensor, k: int) -> Tensor:
    """Return (T, k) int64 columns of the k largest scores of each row, best first; equal scores in column order.

    `torch.topk` leaves the order of equal scores open (it returned columns 6 and 5 of eight equal ones), and a tie that
    breaks differently on another layout changes what is learned. A stable sort breaks it the same way everywhere.

    Args:
        scores: (T, E).
        k: 1 to E.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def coarse(scores: Tensor) -> Tensor:
    """Return scores, which are not negative, rounded to 12 significant bits: for comparing tokens with one another.

    Two equal tokens of a row, such as the same byte twice at its start, have equal scores but for rounding, which the
    layout can change. To 12 bits they are equal, and the earlier one comes first under every layout.
    """
    mantissa, exponent = torch.frexp(scores)
    return torch.ldexp((mantissa * _STEPS).round() / _STEPS, exponent)


def coarse_logits(logits: Tensor) -> Tensor:
    """Return logits rounded to multiples of 1 / 4096, for the same reason: their error does not shrink with them."""
    return (logits * _STEPS).round() / _STEPS
