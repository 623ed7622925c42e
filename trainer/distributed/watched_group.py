"""A group of ranks, and what is recorded and said of its collectives."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist

from trainer.distributed.backend_errors import backend_reason
from trainer.distributed.flight_recorder import FlightRecorder, Operation
from trainer.distributed.watchdog import Watchdog
from trainer.errors import CommError


class WatchedGroup:
    """Ranks whose collectives are recorded, so that a failure can be explained.

    `ranks` are the global ranks of its members, in order, `me` that of this process. `handle` is torch's process group;
    None for a group of one.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        *,
        me: int,
        handle: dist.ProcessGroup | None,
        recorder: FlightRecorder,
        watch: Watchdog | None = None,
    ) -> None:
        assert (handle is None) == (len(ranks) == 1)
        self.name, self.ranks, self.index = name, tuple(ranks), ranks.index(me)
        self._handle, self.recorder, self.watch = handle, recorder, watch
        self.buffers: dict[Hashable, Any] = {}
        """Memory that libraries have for this group, which all layers share."""

    @classmethod
    def of_one(cls, recorder: FlightRecorder | None = None) -> Self:
        """Return a group of this process alone."""
        return cls("world", [0], me=0, handle=None, recorder=recorder or FlightRecorder())

    @property
    def device(self) -> torch.device:
        """Device that tensors must be on."""
        is_nccl = self._handle is not None and dist.get_backend(self._handle) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def handle(self) -> dist.ProcessGroup:
        """Torch's process group, for libraries that communicate by themselves."""
        assert self._handle is not None, "a group of one has no process group"
        return self._handle

    @contextmanager
    def _watched(self, name: str, sizes: Sequence[int]) -> Iterator[None]:
        with self.awaited(self.recorder.note(name, self.name, sizes)):
            yield

    @contextmanager
    def awaited(self, operation: Operation) -> Iterator[None]:
        """Record a wait for an operation. If it fails, the flight recorder keeps it as the running one."""
        self.recorder.wait_for(operation)
        with self._reported(operation):
            yield
        self.recorder.end()

    @contextmanager
    def _reported(self, operation: Operation) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CommError(self._failure(operation, backend_reason(error))) from error

    def _failure(self, operation: Operation, reason: str) -> str:
        return f"rank {self.ranks[self.index]}: {operation} failed at step {self.recorder.step}: {reason}"
