"""Selection with a defined answer where scores are equal."""

import torch
from torch import Tensor

_STEPS = 4096
_GAP = 1 / (4 * _STEPS)


def stable_top_k(scores: Tensor, k: int) -> Tensor:
    """Return (T, k) int64 columns of the k largest scores of each row, best first; equal scores in column order.

    `torch.topk` leaves the order of equal scores open (it returned columns 6 and 5 of eight equal ones), and a tie that
    breaks differently on another layout changes what is learned. A stable sort breaks it the same way everywhere.

    Args:
        scores: (T, E).
        k: 1 to E.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def round_mantissa(scores: Tensor, *, dim: int = 0, group: Tensor | None = None) -> Tensor:
    """Return scores, which are not negative, in 12 significant bits and equal where only rounding tells them apart.

    For comparing tokens with one another: two equal tokens of a row, such as the same byte twice at its start, have
    equal scores but for rounding, which the layout can change. Here they are equal, and what breaks ties by the token's
    place breaks them in the same way under every layout.

    Bits alone would not do, since a score near the border between two of their values falls on either side of it: in
    float32 one in some hundreds does. So scores that differ by less than a quarter of a step become one before.

    Args:
        scores: any shape; 0 for what is not to be chosen, which changes no other.
        dim: along which they are compared.
        group: (n,) int64 beside scores (n,): only those of one group are compared. None: all are.
    """
    mantissa, exponent = torch.frexp(_merged(scores, dim, group, is_relative=True))
    return torch.ldexp((mantissa * _STEPS).round() / _STEPS, exponent)


def round_logits(logits: Tensor, *, dim: int = 0) -> Tensor:
    """Return logits in multiples of 1 / 4096, whose error does not shrink with them, merged as by `round_mantissa`.

    Args:
        logits: any shape; -inf for what is not to be chosen, which changes no other.
        dim: along which they are compared.
    """
    return (_merged(logits, dim, None, is_relative=False) * _STEPS).round() / _STEPS


def _merged(values: Tensor, dim: int, group: Tensor | None, *, is_relative: bool) -> Tensor:
    """Return values in which each has become the largest of those along `dim` that no gap separates from it.

    A gap is a quarter of a step: far more than float32 loses on the way to a score, and so little that hardly any two
    tokens are merged that are not equal.
    """
    if values.dim() == 0:
        return values
    ordered, order = values.movedim(dim, 0).sort(dim=0, descending=True, stable=True)  # (n, ...)
    if group is not None:
        order = order[group[order].argsort(stable=True)]
        ordered = values[order]
    size = ordered[:-1].clamp(min=torch.finfo(values.dtype).tiny) if is_relative else 1.0  # below, bits are lost
    is_first = ordered[:-1] - ordered[1:] > _GAP * size
    if group is not None:
        is_first |= group[order].diff() != 0
    place = torch.arange(len(ordered), device=values.device).view(-1, *(1 for _ in ordered.shape[1:]))
    first = torch.zeros_like(order)  # of those that each is merged with
    first[1:] = torch.where(is_first, place[1:], 0).cummax(0).values
    return torch.empty_like(ordered).scatter(0, order, ordered.gather(0, first)).movedim(0, dim).contiguous()
