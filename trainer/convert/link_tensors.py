"""Tensors of ours as tensors of a published checkpoint, and back, by a link. Nothing is rounded."""

import torch
from torch import Tensor

from trainer.families.link import Interleaved, Link


def to_theirs(region: Tensor, link: Link) -> Tensor:
    """Return their tensor from the region `link.at` of ours; a view where the order is the same."""
    if link.interleaved is not None:
        region = _reorder(region, link.interleaved, to_theirs=True)
    return (region.transpose(-2, -1) if link.transposed else region).reshape(link.shape)


def to_ours(theirs: Tensor, link: Link, region_shape: tuple[int, ...]) -> Tensor:
    """Return the region `link.at` of ours from their tensor; a view where the order is the same."""
    if link.transposed:
        before = (*region_shape[:-2], region_shape[-1], region_shape[-2])
        region = theirs.reshape(before).transpose(-2, -1)
    else:
        region = theirs.reshape(region_shape)
    return region if link.interleaved is None else _reorder(region, link.interleaved, to_theirs=False)


def region_of(ours: Tensor, link: Link) -> Tensor:
    """Return a view of the region `link.at` of our whole tensor."""
    return ours[tuple(slice(start, end) for start, end in link.at)]


def _reorder(region: Tensor, order: Interleaved, *, to_theirs: bool) -> Tensor:
    """Exchange the two orders of a dimension's blocks, a0 a1 ... b0 b1 ... and a0 b0 a1 b1 ..."""
    start, end = order.within
    blocks = region.movedim(order.dim, -1).unflatten(-1, (-1, order.block))
    half = (end - start) // 2
    inner = blocks[..., start:end].unflatten(-1, (2, half) if to_theirs else (half, 2))
    swapped = inner.transpose(-2, -1).flatten(-2)
    whole = torch.cat([blocks[..., :start], swapped, blocks[..., end:]], dim=-1)
    return whole.flatten(-2).movedim(-1, order.dim)
