"""Gradients of replicated weights: all-reduced over the ranks that hold them, in buckets, during the backward pass."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from trainer.distributed.collectives import Group, PendingOp

_BUCKET_BYTES = 25 << 20
"""Gradients summed in one message."""
_IN_FLIGHT = 2
"""Messages under way at a time: each is a copy of its gradients."""


class GradientReducer:
    """Adds up gradients over the ranks of a group.

    #  backward pass  ... block 2 ... block 1 ... block 0
    #  messages              [bucket 0     ][bucket 1     ][bucket 2]     finish

    A bucket departs as soon as the gradients of all its weights are there, and buckets depart in one order everywhere,
    so that every rank's messages meet their own kind.
    """

    def __init__(self, parameters: Sequence[Parameter], group: Group) -> None:
        """Watch some weights.

        Args:
            parameters: in the order of the forward pass; the backward pass fills them from the end.
            group: ranks that hold copies of them.
        """
        self.parameters, self.group = parameters, group
        self._buckets = _buckets(list(reversed(parameters))) if group.size > 1 else []
        self._bucket_of: dict[Tensor, int] = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] | None = None
        self._departed = 0
        self._flights: deque[tuple[list[Parameter], PendingOp]] = deque()
        self._own: list[Tensor] = []
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def expect(self) -> None:
        """Say that the next backward pass is the last one of the step: what it fills may depart."""
        assert not self._flights and self._departed == 0, "the sums of another step are under way"
        self._missing = [len(bucket) for bucket in self._buckets]
        self._own = []

    def finish(self) -> None:
        """Wait until all gradients are summed; a weight without one takes part with zeros."""
        while self._departed < len(self._buckets):
            self._depart()
        while self._flights:
            self._land()
        self._missing, self._departed = None, 0

    @property
    def own_is_finite(self) -> bool:
        """Tell whether this rank's share was finite at the last step, before it was added to the others'."""
        own = self._own
        if self.group.size == 1:  # there are no others: the share is the gradient
            own = [p.grad.sum() for p in self.parameters if p.grad is not None]
        return all(bool(total.isfinite()) for total in own)

    def _arrived(self, parameter: Tensor) -> None:
        if self._missing is None:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._departed < len(self._buckets) and self._missing[self._departed] == 0:
            self._depart()

    @torch.no_grad()
    def _depart(self) -> None:
        if len(self._flights) == _IN_FLIGHT:
            self._land()
        bucket = self._buckets[self._departed]
        self._departed += 1
        share = torch.cat([_gradient(p).reshape(-1) for p in bucket])
        self._own.append(share.sum())  # not finite where a number is not; a sum is one pass over memory
        self._flights.append((bucket, self.group.start_all_reduce(share)))

    @torch.no_grad()
    def _land(self) -> None:
        bucket, flight = self._flights.popleft()
        for parameter, part in zip(bucket, flight.wait().split([p.numel() for p in bucket]), strict=True):
            _gradient(parameter).copy_(part.view_as(parameter))


def _gradient(parameter: Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    buckets: list[list[Parameter]] = []
    size = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if not buckets or size + num_bytes > _BUCKET_BYTES or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += num_bytes
    return buckets
