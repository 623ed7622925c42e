"""Deterministic selection among equal scores."""

import torch
from torch import Tensor

_STEPS = 4096
_GAP = 1 / (4 * _STEPS)
_FEW_PASSES, _COLUMNS_OF_A_PASS = 2, 8
"""Passes that are faster than a sort on the CPU for any number of columns, and columns that allow one more."""


def stable_top_k(scores: Tensor, k: int) -> Tensor:
    """Return (T, k) int64 columns of the k largest scores of each row, best first; equal scores in column order.

    `torch.topk` does not define the order of equal scores (of eight equal ones it returned columns 6 and 5). A tie that
    is broken differently on another layout changes what is learned; a stable sort breaks ties the same way everywhere.
    The CPU sorts slowly: for few of many columns, passes that each find the first of the largest are 1.3 to 7 times as
    fast. Both return the same, NaN as the largest.
    """
    are_few = 0 < k <= max(_FEW_PASSES, scores.shape[-1] // _COLUMNS_OF_A_PASS)
    if scores.device.type != "cpu" or not are_few:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    left = scores.clamp(min=torch.finfo(scores.dtype).min)  # a copy, in which only columns already taken are -inf
    chosen = []
    for _ in range(k):
        best = left.argmax(-1, keepdim=True)  # (T, 1), the first of the largest
        chosen.append(best)
        left.scatter_(-1, best, -torch.inf)
    return torch.cat(chosen, dim=-1)


def best_of_rows(scores: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Return a bool of the shape of scores (B, S) or (B, S, E): the best `count` (B,) valid ones along S of each row.

    Equal scores are in the order of S. valid is (B, S); fewer than `count` are selected if fewer are valid.
    """
    further = (1,) * (scores.dim() - 2)
    order = scores.argsort(dim=1, descending=True, stable=True)
    is_valid = valid.view(*valid.shape, *further).expand_as(scores).gather(1, order)
    is_best = is_valid & (is_valid.cumsum(1) <= count.view(-1, 1, *further))
    return torch.zeros_like(is_valid).scatter(1, order, is_best)


def round_mantissa(scores: Tensor, *, dim: int = 0, group: Tensor | None = None) -> Tensor:
    """Round non-negative scores to 12 significant bits, and make those equal that differ by rounding error only.

    Needed when tokens compete: equal tokens of a row, such as a repeated byte, have equal scores up to rounding error,
    which depends on the layout. After rounding they are exactly equal, so breaking ties by position gives the same
    result under every layout.

    Rounding alone would not suffice: a score near the boundary between two rounded values can fall on either side, in
    float32 one in a few hundred does. Therefore scores that differ by less than a quarter of a step are merged first.

    Args:
        scores: any shape; 0 for excluded entries, which do not affect the others.
        dim: dimension along which scores are compared.
        group: (n,) int64 group of each of the scores (n,); only scores of the same group are compared. None: all.
    """
    mantissa, exponent = torch.frexp(_merged(scores, dim, group, is_relative=True))
    return torch.ldexp((mantissa * _STEPS).round() / _STEPS, exponent)


def round_logits(logits: Tensor, *, dim: int = 0) -> Tensor:
    """Round logits to multiples of 1 / 4096 (their error is absolute), after merging as in `round_mantissa`.

    -inf excludes an entry, which does not affect the others.
    """
    return (_merged(logits, dim, None, is_relative=False) * _STEPS).round() / _STEPS


def _merged(values: Tensor, dim: int, group: Tensor | None, *, is_relative: bool) -> Tensor:
    """Replace each value by the largest of its cluster: values along `dim` without a gap between neighbours.

    A gap is a quarter of a step: far above float32 rounding error, yet so small that unequal tokens are hardly ever
    merged.
    """
    if values.dim() == 0:
        return values
    ordered, order = values.movedim(dim, 0).sort(dim=0, descending=True, stable=True)  # (n, ...)
    if group is not None:
        order = order[group[order].argsort(stable=True)]
        ordered = values[order]
    size = ordered[:-1].clamp(min=torch.finfo(values.dtype).tiny) if is_relative else 1.0  # smaller values lose bits
    is_first = ordered[:-1] - ordered[1:] > _GAP * size
    if group is not None:
        is_first |= group[order].diff() != 0
    place = torch.arange(len(ordered), device=values.device).view(-1, *(1 for _ in ordered.shape[1:]))
    first = torch.zeros_like(order)  # index of the first of each cluster
    first[1:] = torch.where(is_first, place[1:], 0).cummax(0).values
    return torch.empty_like(ordered).scatter(0, order, ordered.gather(0, first)).movedim(0, dim).contiguous()
