"""Selection with a defined answer where scores are equal."""

import torch
from torch import Tensor

_STEPS = 4096
_GAP = 1 / (4 * _STEPS)


def first_top_k(scores: Tensor, k: int) -> Tensor:
    """Return (T, k) int64 columns of the k largest scores of each row, best first; equal scores in column order.

    `torch.topk` leaves the order of equal scores open (it returned columns 6 and 5 of eight equal ones), and a tie that
    breaks differently on another layout changes what is learned. A stable sort breaks it the same way everywhere.

    Args:
        scores: (T, E).
        k: 1 to E.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def coarse(scores: Tensor, group: Tensor | None = None) -> Tensor:
    """Return scores, which are not negative, in 12 significant bits and equal where only rounding tells them apart.

    For comparing tokens with one another: two equal tokens of a row, such as the same byte twice at its start, have
    equal scores but for rounding, which the layout can change. Here they are equal, and what breaks ties by the token's
    place breaks them in the same way under every layout.

    Bits alone would not do, since a score near the border between two of their values falls on either side of it: in
    float32 one in some hundreds does. So scores that differ by less than a quarter of a step become one before.

    Args:
        scores: (n, E), each column compared by itself; or (n,); or one alone.
        group: (n,) int64 beside scores (n,): only those of one group are compared. None: all are.
    """
    mantissa, exponent = torch.frexp(_merged(scores, group, is_relative=True))
    return torch.ldexp((mantissa * _STEPS).round() / _STEPS, exponent)


def coarse_logits(logits: Tensor) -> Tensor:
    """Return logits (n, E) in multiples of 1 / 4096, columns merged likewise: their error does not shrink with them."""
    return (_merged(logits, None, is_relative=False) * _STEPS).round() / _STEPS


def _merged(values: Tensor, group: Tensor | None, *, is_relative: bool) -> Tensor:
    """Return values (n, ...) in which each has become the largest of those that no gap separates from it.

    A gap is a quarter of a step: far more than float32 loses on the way to a score, and so little that hardly any two
    tokens are merged that are not equal.
    """
    if values.dim() == 0:
        return values
    order = values.argsort(dim=0, descending=True, stable=True)
    if group is not None:
        order = order[group[order].argsort(stable=True)]
    ordered = values.gather(0, order)
    gap = ordered[:-1] - ordered[1:]
    size = ordered[:-1].clamp(min=torch.finfo(values.dtype).tiny) if is_relative else 1.0  # below, bits are lost
    is_first = gap > _GAP * size
    if group is not None:
        is_first |= group[order].diff() != 0
    place = torch.arange(len(values), device=values.device).view(-1, *(1 for _ in values.shape[1:]))
    first = torch.zeros_like(order)  # of those that each is merged with
    first[1:] = torch.where(is_first, place[1:], 0).cummax(0).values
    return values.scatter(0, order, ordered.gather(0, first))
