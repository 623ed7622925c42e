"""An exchange by a library that starts and awaits its own messages, noted by the flight recorder as a collective."""

from abc import ABC
from collections.abc import Callable

from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.distributed.exchange import Arriving, Exchange


class LibraryExchange(Exchange, ABC):
    """An exchange there and back by a library."""

    def __init__(self, group: Group, name: str) -> None:
        super().__init__()
        self.group, self.name = group, name

    def start(self, send: Callable[..., Arriving], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Start a direction of the exchange; return the tensors that are being filled."""
        operation = self.group.recorder.note(self.name, self.group.name, [len(tensors[0])])
        with self.group.awaited(operation):  # the host waits for the sizes
            return super().start(send, tuple(tensor.contiguous() for tensor in tensors))
