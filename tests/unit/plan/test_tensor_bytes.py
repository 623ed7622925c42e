"""The count of living tensors."""

import gc

import pytest
import torch

from trainer.plan.tensor_bytes import OverLimit, TensorBytes


def test_a_storage_counts_once_until_its_last_tensor_is_gone() -> None:
    with TensorBytes() as counts:
        x = torch.ones(10, dtype=torch.float64)
        view = x.view(2, 5)[1]
        assert counts.live == 80
        del x
        gc.collect()
        assert counts.live == 80
        del view
        gc.collect()
        assert counts.live == 0 and counts.peak == 80


def test_the_peak_of_a_window_has_what_was_alive_before() -> None:
    with TensorBytes() as counts:
        kept = torch.zeros(5)
        counts.enter("first")
        torch.zeros(10)
        counts.enter("second", 3)
        assert counts.peaks["first", None] == 60 and counts.peaks["second", 3] == 20
        counts.enter("first")
        assert kept.sum() == 0
        assert counts.peaks["first", None] == 60


def test_storages_that_are_resized_are_followed() -> None:
    resize = torch.UntypedStorage.resize_
    with TensorBytes() as counts:
        x = torch.zeros(100, dtype=torch.uint8)
        x.untyped_storage().resize_(0)
        assert counts.live == 0
        x.untyped_storage().resize_(60)
        assert counts.live == 60
    assert torch.UntypedStorage.resize_ is resize


def test_more_than_the_limit_is_an_error() -> None:
    with TensorBytes(limit=100) as counts:
        kept = torch.zeros(25)
        with pytest.raises(OverLimit, match="101 bytes of tensors, and 100 are allowed"):
            torch.zeros(1, dtype=torch.uint8)
    assert kept.numel() == 25 and counts.peak == 101
