"""Poisoned memory: what nobody writes is NaN, in forward and backward passes, for Python code and for torch's own."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from trainer.ops.poisoned_memory import poisoned_memory

CPU = torch.device("cpu")
SIZE = 50_000


class _Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def test_memory_that_is_not_written_is_nan_in_both_passes() -> None:
    x = torch.ones(3, 5, requires_grad=True)
    with poisoned_memory([], [], CPU):
        y = _Unwritten.apply(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        number = torch.empty(4, dtype=torch.int64)
    assert y.isnan().all() and grad.isnan().all() and number.dtype is torch.int64
    assert torch.equal(torch.ones(2), torch.ones(2)), "what is written is as it was"


def test_operations_that_do_not_go_through_python_get_memory_that_was_filled() -> None:
    with poisoned_memory([SIZE], [torch.float32], CPU), _disable_current_modes():
        out = torch.empty(SIZE)  # as in an operation written in C++
    assert out.isnan().float().mean() > 0.9, "but for what the allocator itself writes"
