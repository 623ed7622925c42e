"""Where an exchange runs while something else is computed: beside the computation, on a stream of its own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from trainer.distributed.exchange import Arriving


class ExchangeStream(Protocol):
    """Runs exchanges in the order in which they are started."""

    def start(self, exchange: Callable[[], tuple[Tensor, ...]], given: Sequence[Tensor]) -> Arriving:
        """Start an exchange that reads the given tensors."""
        ...


def exchange_stream(device: torch.device) -> ExchangeStream:
    """Return where exchanges of a device run."""
    return _CudaStream(device) if device.type == "cuda" else _InOrder()


def stream_pointer(device: torch.device) -> int:
    """Return the address of the present stream, for libraries; 0 on a device without streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class _InOrder:
    """A device without streams: an exchange is over when it has been started."""

    def start(self, exchange: Callable[[], tuple[Tensor, ...]], given: Sequence[Tensor]) -> Arriving:
        """Run an exchange."""
        return Arriving(exchange(), tuple)


class _CudaStream:
    """A stream of a GPU. Memory of one stream that the other uses is not given away before both are done with it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, exchange: Callable[[], tuple[Tensor, ...]], given: Sequence[Tensor]) -> Arriving:
        """Start an exchange after what has been computed until now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            tensors = exchange()
            event.record()
        for tensor in given:
            tensor.record_stream(self._stream)
        return Arriving(tensors, partial(self._join, event, tensors))

    def _join(self, event: torch.cuda.Event, tensors: Sequence[Tensor]) -> None:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(computing)
