"""An exchange by a library that starts and awaits its own messages, noted by the flight recorder as a collective."""

from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.distributed.exchange import Arriving, Exchange
from trainer.errors import ConfigError, first_line

KEY = "parallel.dispatcher"


@contextmanager
def starting(library: str) -> Iterator[None]:
    """Explain what is missing if a library does not start in this block.

    Raises:
        ConfigError: with what it says.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # they check GPUs, links and NCCL by assertions and errors of all kinds
        problem = f"{library} does not start here: {type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{KEY}: {problem}; use all_to_all, or see docs/dispatchers.md for what it needs") from error


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
