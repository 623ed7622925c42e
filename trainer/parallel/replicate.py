"""Bucketed all-reduce of the gradients of replicated weights, overlapped with the backward pass."""

from collections import deque
from collections.abc import Callable, Sequence
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.nn import Parameter

from trainer.distributed.collectives import Group, PendingOp

_BUCKET_BYTES = 25 << 20
"""Bytes of gradients per message."""
_MAX_PENDING = 2
"""Maximum pending messages; each holds a copy of its gradients."""


class GradientReducer:
    """All-reduces gradients over a group.

    #  backward pass  ... block 2 ... block 1 ... block 0
    #  messages              [bucket 0     ][bucket 1     ][bucket 2]     finish

    A bucket is launched as soon as all its gradients are ready, in the same order on every rank, so that collectives
    match.
    """

    def __init__(self, parameters: Sequence[Parameter], group: Group) -> None:
        """Register hooks on the parameters.

        They are in the order of the forward pass: the backward pass reaches the last ones first.
        """
        self.parameters, self.group = parameters, group
        self._buckets = _buckets(list(reversed(parameters))) if group.size > 1 else []
        self._bucket_of: dict[Tensor, int] = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] | None = None
        self._launched = 0
        self._pending: deque[tuple[list[Parameter], PendingOp]] = deque()
        self._local_sums: list[Tensor] = []
        hook = _weak(self._on_gradient)
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(hook)

    def expect(self) -> None:
        """Announce the last backward pass of the step, during which buckets are launched."""
        assert not self._pending and self._launched == 0, "the reduction of another step is pending"
        self._missing = [len(bucket) for bucket in self._buckets]
        self._local_sums = []

    def finish(self) -> None:
        """Wait until all gradients are reduced; a missing gradient counts as zeros."""
        while self._launched < len(self._buckets):
            self._launch()
        while self._pending:
            self._wait_for_oldest()
        self._missing, self._launched = None, 0

    @property
    def local_is_finite(self) -> bool:
        """True if this rank's gradients were finite in the last step, before the reduction."""
        sums = self._local_sums
        if self.group.size == 1:  # no reduction: the local gradient is the gradient
            sums = [p.grad.sum() for p in self.parameters if p.grad is not None]
        return all(bool(total.isfinite()) for total in sums)

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._missing is None:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._launched < len(self._buckets) and self._missing[self._launched] == 0:
            self._launch()

    @torch.no_grad()
    def _launch(self) -> None:
        if len(self._pending) == _MAX_PENDING:
            self._wait_for_oldest()
        bucket = self._buckets[self._launched]
        self._launched += 1
        share = torch.cat([_gradient(p).reshape(-1) for p in bucket])
        self._local_sums.append(share.sum())  # finite unless a value is not; a single pass over memory
        self._pending.append((bucket, self.group.start_all_reduce(share)))

    @torch.no_grad()
    def _wait_for_oldest(self) -> None:
        bucket, pending = self._pending.popleft()
        for parameter, part in zip(bucket, pending.wait().split([p.numel() for p in bucket]), strict=True):
            _gradient(parameter).copy_(part.view_as(parameter))


def _weak(hook: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return a hook that does not keep the object of the method alive.

    Python's garbage collector does not see hooks: with its reducer a parameter would keep the model and the group,
    whose threads look for messages a hundred times a second, for as long as the process lives.
    """
    method = WeakMethod(hook)

    def call(parameter: Tensor) -> None:
        if (alive := method()) is not None:
            alive(parameter)

    return call


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
