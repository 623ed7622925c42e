"""Gradients of replicated weights: summed over the ranks that hold them, in buckets."""

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.distributed.collectives import Group

_BUCKET_BYTES = 25 << 20
"""Gradients summed in one message."""


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.nn.Parameter], group: Group) -> None:
    """Add up the gradients over the ranks of a group, in place; a parameter without one takes part with zeros."""
    if group.size == 1:
        return
    for bucket in _buckets(parameters):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        group.sum_(flat)
        start = 0
        for gradient in bucket:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        num_bytes = parameter.grad.numel() * parameter.grad.element_size()
        if bucket and (size + num_bytes > _BUCKET_BYTES or parameter.grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter.grad)
        size += num_bytes
    if bucket:
        yield bucket
