"""Sums for global-batch losses keep their identity and dtype under addition and all-reduce."""

import torch

from trainer.moe.loss_stats import LossStats

COUNTS, IMPORTANCE, LOAD = torch.tensor([[5, 3], [4, 4]]), torch.tensor([[1.5, 0.5], [1.0, 2.0]]), torch.ones(2, 2)


def _sums(importance: torch.Tensor | None = IMPORTANCE) -> LossStats:
    return LossStats(counts=COUNTS, importance=importance, load=LOAD)


def test_sums_of_a_layer_and_of_two_sets_of_tokens() -> None:
    assert _sums().layer(1).counts.tolist() == [4, 4]
    two = (_sums() + _sums()).layer(0)
    assert two.importance is not None and two.importance.tolist() == [3.0, 1.0]
    assert two.load is not None and two.load.tolist() == [2.0, 2.0]
    assert two.counts.tolist() == [10, 6] and two.counts.dtype == torch.int64


def test_sums_that_are_not_there_stay_away() -> None:
    found = _sums(None).with_tensors([COUNTS + 1, LOAD + 1])
    assert found.importance is None
    assert torch.equal(found.counts, COUNTS + 1)
    assert found.load is not None and torch.equal(found.load, LOAD + 1)
