"""Fake tensors whose integers are known."""

from collections.abc import Iterator

import pytest
import torch

from trainer.plan.assumed_load import AssumedLoad
from trainer.plan.assumed_values import UnknownValue
from trainer.plan.fake_ranks import fake_tensors

LOAD = AssumedLoad([4, 2, 1, 1], 2)


@pytest.fixture(autouse=True)
def fakes() -> Iterator[None]:
    with fake_tensors(LOAD):
        yield


def test_sizes_are_computed_for_real_and_numbers_are_not() -> None:
    key = torch.tensor([2, 0, 1, 2])
    counts = key.new_zeros(3).scatter_add_(0, key, torch.ones_like(key))
    assert counts.tolist() == [1, 1, 2] and int(counts.sum()) == 4
    assert key.argsort(stable=True).tolist() == [1, 2, 0, 3]
    assert torch.ones(2, 2).sum().item() == 1.0, "numbers that are read are finite, and mean nothing"
    assert (key > 0).nonzero().shape == (3, 1) and key.bincount().tolist() == [1, 1, 2]


def test_what_follows_from_numbers_is_refused_where_it_becomes_a_size() -> None:
    chosen = torch.rand(8) > 0.5
    with pytest.raises(UnknownValue, match="nonzero"):
        chosen.nonzero()
    with pytest.raises(UnknownValue):
        int(chosen.sum())


@pytest.mark.parametrize("is_sorted", [True, False])
def test_experts_are_chosen_by_the_load(is_sorted: bool) -> None:
    scores = torch.rand(8, 4)
    if is_sorted:
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :2]
    else:
        left = scores.clamp(min=0)
        chosen = torch.cat([left.argmax(-1, keepdim=True) for _ in range(2)], dim=-1)
    assert chosen.tolist() == LOAD.choice(8).tolist()
    assert scores.topk(2).indices.tolist() == chosen.tolist()


def test_values_change_in_place_and_are_forgotten_when_they_become_unknown() -> None:
    x = torch.arange(4)
    x.add_(1)
    view = x[1:]
    view.mul_(10)
    assert x.tolist() == [1, 20, 30, 40]
    x.copy_(torch.rand(4))
    with pytest.raises(UnknownValue):
        x.sum().item()


def test_reading_lists_is_as_before_outside() -> None:
    assert torch.tensor([[1, 2]]).tolist() == [[1, 2]]
