"""RMSNorm as one node: value, gradients, dtypes and what it saves."""

import pytest
import torch
from torch import Tensor

from trainer.ops.rms_norm import rms_norm

SHAPES = [(2, 5, 8), (2, 3, 5, 8), (1, 8), (0, 8)]


def _by_autograd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.to(weight.dtype)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x, weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_autograd(shape: tuple[int, ...], eps: float) -> None:
    inputs = _inputs(shape)
    mine, theirs = rms_norm(*inputs, eps), _by_autograd(*inputs, eps)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for a, b in zip(*(torch.autograd.grad(y, inputs, grad) for y in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_frozen_weight_has_no_gradient_and_the_input_has_the_same() -> None:
    x, weight = _inputs((2, 5, 8))
    both = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), (x, weight))
    node = rms_norm(x, weight.detach(), 1e-6)
    with torch.no_grad():
        found = node.grad_fn.apply(2 * node)  # pyrefly: ignore[missing-attribute]
    assert torch.equal(found[0], both[0]) and found[1] is None


def test_narrow_inputs_are_normalized_in_the_dtype_of_the_weight() -> None:
    x, weight = _inputs((4, 8), torch.bfloat16)
    y = rms_norm(x, weight, 1e-6)
    grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert torch.equal(y, _by_autograd(x, weight, 1e-6))


def test_only_the_input_is_saved() -> None:
    x, weight = _inputs((4, 8), torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        rms_norm(x, weight, 1e-6)
    assert [tuple(t.shape) for t in saved] == [(4, 8), (8,), (4, 1)]
    assert saved[0].data_ptr() == x.data_ptr() and saved[1].data_ptr() == weight.data_ptr()
