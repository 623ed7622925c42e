"""Bytes saved for backward, and the peak of a computation, against sums by hand."""

import pytest
import torch
from torch import Tensor

from trainer.lab.costs.saved_bytes import counting_saved_bytes, peak_bytes

CPU = torch.device("cpu")


def saved_bytes(x: Tensor, weight: Tensor, *, is_cast: bool = False) -> int:
    """Count what a product and an exponential save."""
    with counting_saved_bytes([weight]) as saved:
        h = x @ (weight.to(torch.float32) if is_cast else weight)
        h.exp().sum().backward()
    return sum(saved.values())


def test_the_input_and_what_later_operations_need_are_saved_but_not_the_weight() -> None:
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    assert saved_bytes(x, weight) == x.nbytes + 10 * 6 * 4


def test_a_copy_of_a_weight_in_another_dtype_counts() -> None:
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(x, weight, is_cast=True) == x.nbytes + 10 * 6 * 4 + 4 * 6 * 4


def test_tensors_that_share_a_storage_count_once_and_whole() -> None:
    x = torch.randn(8, 4, requires_grad=True)
    with counting_saved_bytes([]) as saved:
        (x[:2] * x[:3].sum()).sum().backward()
        x[:4].square().sum().backward()
    assert saved[x.untyped_storage().data_ptr()] == x.nbytes
    assert sum(saved.values()) == x.nbytes + 4, "and the sum"


def test_the_peak_is_the_most_that_is_alive_at_a_time() -> None:
    def run() -> None:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = torch.cat([b, b])
        del b
        torch.ones(100) + c[:100]

    assert peak_bytes(run, CPU) == 4000 + 8000
    assert peak_bytes(run, CPU) == 12000, "the same again"


def test_what_was_there_before_is_not_in_the_peak() -> None:
    before = torch.ones(10_000)
    assert peak_bytes(lambda: before[:100].neg(), CPU) == 400


@pytest.mark.slow
def test_compiled_code_is_in_the_peak() -> None:
    """Its buffers are allocated without an operation that a dispatch mode would see."""
    run = torch.compile(lambda x: (x.sin().sum(0, keepdim=True) + x).cos().sum(1, keepdim=True) * x)
    x = torch.ones(64, 64)
    run(x)
    assert peak_bytes(lambda: run(x), CPU) >= x.nbytes
