"""What was copied ahead is used for its own rows only, once, and on the CPU there is nothing to copy to."""

from collections.abc import Sequence

import torch

from tests.builders import make_batch
from trainer.data.batches.batch import Batch
from trainer.data.batches.copy_ahead import CopyAhead

BATCHES = [make_batch(2, 8, seed=1), make_batch(2, 8, seed=2)]


class _Stream:
    joined = 0

    def copied(self, batches: Sequence[Batch]) -> list[Batch]:
        return list(batches)

    def join(self, copies: Sequence[Batch]) -> None:
        self.joined += len(copies)


def test_copies_are_taken_once_and_only_for_their_rows() -> None:
    stream = _Stream()
    ahead = CopyAhead(stream)
    assert ahead.is_on and ahead.take(0) is None
    ahead.start(4, BATCHES)
    assert ahead.take(4) == BATCHES and stream.joined == 2
    assert ahead.take(4) is None
    ahead.start(8, BATCHES)
    assert ahead.take(12) is None, "other rows"
    assert ahead.take(8) is None and stream.joined == 2


def test_on_the_cpu_nothing_is_copied() -> None:
    ahead = CopyAhead.to_device(torch.device("cpu"))
    ahead.start(0, BATCHES)
    assert not ahead.is_on and ahead.take(0) is None
