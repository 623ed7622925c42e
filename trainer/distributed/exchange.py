"""An exchange of tensors between ranks as two autograd nodes, between which it is under way, forward and backward.

forward    node of the start: send ~~~~~~~ node of the wait: received
backward   gradients received ~~~~~~~~~~~~ send back their gradients
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Arriving(NamedTuple):
    """Tensors that are being filled."""

    tensors: tuple[Tensor, ...]
    wait: Callable[[], object]
    """Waits for them, on the stream of the computation; they are not read before."""


class Exchange(ABC):
    """An exchange there and back: how tensors are sent, how their gradients are, and what is in flight."""

    def __init__(self) -> None:
        self.pending: Arriving | None = None

    @abstractmethod
    def send(self, *tensors: Tensor) -> Arriving:
        """Start to send tensors."""

    @abstractmethod
    def send_back(self, *gradients: Tensor) -> Arriving:
        """Start to send the gradients of what arrived; what arrives are those of what was sent."""

    def start(self, send: Callable[..., Arriving], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Start a direction of the exchange; return the tensors that are being filled."""
        assert self.pending is None, "a direction of it is already in flight"
        self.pending = send(*tensors)
        return self.pending.tensors

    def received(self) -> tuple[Tensor, ...]:
        """Wait for the direction that is pending, and return its tensors."""
        assert self.pending is not None, "nothing is in flight: wait once"
        pending, self.pending = self.pending, None
        pending.wait()
        return pending.tensors


class UnderWay(NamedTuple):
    """Tensors under way. Backward, the gradient is in flight from the node of `wait` to that of the start.

    A named tuple, since FSDP2 looks into tuples for the tensors between two parts of a layer.
    """

    sent: tuple[Tensor, ...]
    """The tensors, as the node of `wait` depends on them."""
    exchange: Exchange

    @classmethod
    def start(cls, exchange: Exchange, *tensors: Tensor) -> "UnderWay":
        """Start to send tensors."""
        return cls(_Start.apply(exchange, *tensors), exchange)

    def wait(self) -> tuple[Tensor, ...]:
        """Return what has arrived. Call it once."""
        return _Wait.apply(self.exchange, *self.sent)


class _Start(torch.autograd.Function):
    """Start to send tensors. Backward waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange.start(exchange.send, tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)  # makes `_Wait` depend on this node

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.received()


class _Wait(torch.autograd.Function):
    """Wait for tensors. Backward starts to send their gradients and returns buffers, which only `_Start` may read."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *sent: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.received()

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exchange: Exchange = ctx.exchange
        return None, *exchange.start(exchange.send_back, gradients)
