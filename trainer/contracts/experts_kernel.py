"""Contract of an experts kernel: the numbers and gradients of `trainer.ops.expert_ffn.loop_ffn`."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.contracts.ensure import ensure
from trainer.ops.expert_ffn import Activation, loop_ffn

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Activation], Tensor]
_D, _F = 8, 16


def rows_equal_the_loop(kernel: Kernel) -> None:
    """Outputs and gradients are those of a loop over the experts."""
    _compare(kernel, [3, 5, 1, 7])


def idle_experts_equal_the_loop(kernel: Kernel) -> None:
    """Experts without rows change nothing."""
    _compare(kernel, [0, 4, 0, 0])


def no_rows_equal_the_loop(kernel: Kernel) -> None:
    """A rank without rows gets an empty output."""
    _compare(kernel, [0, 0, 0, 0])


CHECKS = [rows_equal_the_loop, idle_experts_equal_the_loop, no_rows_equal_the_loop]


def _compare(kernel: Kernel, rows: list[int]) -> None:
    for activation in ("swiglu", "gelu"):
        found, expected = (_run(each, rows, activation) for each in (kernel, loop_ffn))
        for name, one, other in zip(("output", "x's gradient", "w_in's gradient"), found, expected, strict=True):
            where = f"{activation}, rows_per_expert {rows}: {name}"
            ensure(one.shape == other.shape, f"{where} has shape {tuple(one.shape)}, not {tuple(other.shape)}")
            atol = 1e-5 * float(other.abs().max()) if other.numel() else 0.0
            ensure(torch.allclose(one, other, rtol=0, atol=atol), f"{where} differs from that of the loop")


def _run(kernel: Kernel, rows: list[int], activation: Activation) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = 2 * _F if activation == "swiglu" else _F
    x = torch.randn(sum(rows), _D, generator=generator).requires_grad_()
    w_in = torch.randn(len(rows), width, _D, generator=generator).requires_grad_()
    w_out = torch.randn(len(rows), _D, _F, generator=generator)
    y = kernel(x, torch.tensor(rows), w_in, w_out, activation)
    grads = torch.autograd.grad(y.square().sum(), (x, w_in), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip((x, w_in), grads, strict=True))]
