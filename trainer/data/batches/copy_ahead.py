"""Rows of the next step, on their way to the device while the present step is computed.

host       read step 2 | start step 1      | read step 3 | start step 2
copies                 | rows of step 2    |             | rows of step 3
computed               | step 1 ...........|             | step 2 ...........
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from trainer.data.batches.batch import Batch


class SideStream(Protocol):
    """Copies micro-batches to a device beside what is computed there."""

    def copied(self, batches: Sequence[Batch]) -> list[Batch]:
        """Start to copy and return the copies, which nobody may use before `join`."""
        ...

    def join(self, copies: Sequence[Batch]) -> None:
        """Let all that is computed from now on wait for these copies."""
        ...


class CudaSideStream:
    """A stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copied(self, batches: Sequence[Batch]) -> list[Batch]:
        """Start to copy on the stream."""
        with torch.cuda.stream(self._stream):
            return [batch.to(self._device) for batch in batches]

    def join(self, copies: Sequence[Batch]) -> None:
        """Let the present stream wait for this one, and keep the copies' memory until it is done with them."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for batch in copies:
            for tensor in batch.tensors().values():  # their memory was allocated for the other stream
                tensor.record_stream(computing)


class CopyAhead:
    """The rows that have been copied ahead, if any.

    The run's position does not know of them: they are read again by whoever resumes before they were used.
    """

    def __init__(self, stream: SideStream | None) -> None:
        """Copy on this stream; None: there is nothing to copy to, as on the CPU."""
        self._stream = stream
        self._first_row, self._copies = -1, []

    @classmethod
    def to_device(cls, device: torch.device) -> "CopyAhead":
        """Return what copies to a device: nothing if that is the CPU."""
        return cls(CudaSideStream(device) if device.type == "cuda" else None)

    @property
    def is_on(self) -> bool:
        """Whether rows are copied ahead."""
        return self._stream is not None

    def start(self, first_row: int, batches: Sequence[Batch]) -> None:
        """Start to copy the micro-batches of the step that begins with this row."""
        if self._stream is not None:
            self._first_row, self._copies = first_row, self._stream.copied(batches)

    def take(self, first_row: int) -> list[Batch] | None:
        """Return the micro-batches of the step that begins with this row, and forget them; None: not copied."""
        copies, self._copies = self._copies, []
        if self._stream is None or not copies or self._first_row != first_row:
            return None
        self._stream.join(copies)
        return copies
