"""Sums come to the host in one message, with their shapes, dtypes and every count exact."""

import torch

from trainer.engine.base import RoutingSums
from trainer.metrics.device_waits import DeviceWaits


def test_sums_come_to_the_host_in_one_wait() -> None:
    sums = RoutingSums(
        counts=torch.tensor([[2**53 - 1, 0], [3, 4]]),
        dropped=torch.tensor([5, 6]),
        tokens=torch.tensor([7, 8]),
        entropy_sum=torch.tensor([0.1, 0.2]),
    )
    with DeviceWaits() as counted:
        there, more = sums.on_host(torch.tensor([0.3, 0.4]))
        there.counts.tolist()
    assert len(counted.waits) == 1 and more is not None and torch.equal(more, torch.tensor([0.3, 0.4])), (
        "in its own dtype"
    )
    for mine, expected in zip(there.tensors(), sums.tensors(), strict=True):
        assert mine.dtype == expected.dtype and torch.equal(mine, expected)


def test_sums_that_do_not_exist_stay_away() -> None:
    zero = torch.zeros(2, dtype=torch.int64)
    there, more = RoutingSums(counts=zero[None], dropped=zero, tokens=zero, entropy_sum=None).on_host()
    assert there.entropy_sum is None and more is None
