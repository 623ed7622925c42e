"""Double of the stream of exchanges: what they return is NaN until it is awaited, so that reading too early shows."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trainer.distributed.exchange import Arriving

NAN_BYTE = 255
"""All bits set: NaN in every floating-point dtype, and -1 in every integer."""


class LateStream:
    """Runs exchanges at once, and shows their results once they are awaited."""

    def start(self, exchange: Callable[[], tuple[Tensor, ...]], given: Sequence[Tensor]) -> Arriving:
        """Run an exchange."""
        results = [exchange()]
        shown = tuple(torch.empty_like(result) for result in results[0])
        for buffer in shown:
            buffer.view(torch.uint8).fill_(NAN_BYTE)
        return Arriving(shown, partial(_show, shown, results))


def _show(shown: Sequence[Tensor], results: list[tuple[Tensor, ...]]) -> None:
    for buffer, result in zip(shown, results.pop(), strict=True):  # a second wait fails
        buffer.copy_(result)
