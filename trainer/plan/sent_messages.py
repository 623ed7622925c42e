"""Messages between stages of a pipeline: their tensors are alive as long as on real ranks, whose handles have them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules


@dataclass(slots=True)
class SentMessage:
    """Handle of a message of a fake process group, whose own has no tensor."""

    work: dist.Work
    tensor: Tensor

    def wait(self) -> Any:
        """Wait for the message, which nobody receives."""
        return self.work.wait()


@contextmanager
def kept_messages() -> Iterator[None]:
    """Let the handles that torch's schedules collect have their tensors."""
    batch = schedules._batch_p2p

    def kept(operations: Sequence[dist.P2POp], desc: str | None = None) -> list[Any]:
        works = batch(list(operations), desc)
        assert len(works) == len(operations), "the fake group takes each message by itself"
        return [SentMessage(work, one.tensor) for work, one in zip(works, operations, strict=True)]

    schedules._batch_p2p = kept  # type: ignore[assignment]
    try:
        yield
    finally:
        schedules._batch_p2p = batch
