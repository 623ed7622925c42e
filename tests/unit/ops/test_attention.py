"""Attention by blocks equals torch's kernel, forward and backward, in every dtype, under autocast or not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.attention import blocked_attention, torch_attention

B, H, d = 2, 4, 8


def _run(attention: Callable, S: int, kv_heads: int, dtype: torch.dtype, value_dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(B, H, S, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    k = torch.randn(B, kv_heads, S, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    v = torch.randn(B, kv_heads, S, d, generator=generator, dtype=torch.float64).to(value_dtype).requires_grad_()
    y = attention(q, k, v)
    assert y.shape == q.shape and y.dtype == value_dtype
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((y * weight).sum(), (q, k, v))
    assert [g.dtype for g in gradients] == [dtype, dtype, value_dtype]
    return [y, *gradients]


def _oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over the keys that are not later, head by head."""
    kv = [head * k.shape[1] // q.shape[1] for head in range(q.shape[1])]
    with torch.autocast("cpu", enabled=False):
        scores = q.double() @ k.double()[:, kv].transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        return (torch.softmax(scores, -1) @ v.double()[:, kv]).to(v.dtype)


@pytest.mark.parametrize("attention", [torch_attention, blocked_attention])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("S", [1, 5, 64, 130])
def test_attention_equals_the_definition(attention: Callable, S: int, kv_heads: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for mine, oracle in zip(
            _run(attention, S, kv_heads, dtype, dtype), _run(_oracle, S, kv_heads, dtype, dtype), strict=True
        ):
            torch.testing.assert_close(mine, oracle, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", [torch_attention, blocked_attention])
@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_bfloat16_values_keep_exact_scores(attention: Callable, sharpness: float) -> None:
    """Queries and keys are float32 after the rotary turn, and stay so where the scores are made, autocast or not.

    Autocast alone would round them: scores of up to 30, as the sharper ones are, would be wrong by 0.06.
    """

    def under_autocast(attend: Callable) -> Callable:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return attend(q * sharpness, k, v)

        return attention

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    mine, oracle, others = (
        _run(under_autocast(attend), 130, 2, torch.float32, torch.bfloat16) for attend in (attention, _oracle, rounded)
    )
    errors = [_relative_error(a, b) for a, b in zip(mine, oracle, strict=True)]
    assert errors[0] < 0.004, "half a unit in the last of 8 bits"
    for error, other, exact in zip(errors, others, oracle, strict=True):
        assert error < 1.1 * _relative_error(other, exact)


def _relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().double().norm() / b.detach().double().norm())
