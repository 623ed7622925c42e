"""Blocked attention equals torch's kernel, forward and backward, in every dtype, with and without autocast."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.attention import blocked_attention, repeat_kv, torch_attention
from trainer.ops.attention_mask import AttentionMask

B, H, d = 2, 4, 8


def _run(
    attention: Callable,
    S: int,
    kv_heads: int,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    mask: Tensor | None = None,
    width: int = d,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(B, H, S, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    k = torch.randn(B, kv_heads, S, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    v = torch.randn(B, kv_heads, S, width, generator=generator, dtype=torch.float64).to(value_dtype).requires_grad_()
    y = attention(q, k, v, mask)
    assert y.shape == (B, H, S, width) and y.dtype == value_dtype
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((y * weight).sum(), (q, k, v))
    assert [g.dtype for g in gradients] == [dtype, dtype, value_dtype]
    return [y, *gradients]


def _oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys visible by the mask, or all that are not later, head by head."""
    kv = [head * k.shape[1] // q.shape[1] for head in range(q.shape[1])]
    with torch.autocast("cpu", enabled=False):
        scores = q.double() @ k.double()[:, kv].transpose(-1, -2) / q.shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool() if mask is None else ~mask
        scores = scores.masked_fill(hidden, float("-inf"))
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
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("S", [1, 5, 64, 130, 600])
def test_no_query_sees_another_document(attention: Callable, S: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(S)
    document = (torch.rand(B, S, generator=generator) < 0.1).cumsum(1)
    document[1, S // 2 :] = -1  # padding
    mask = AttentionMask(document=document).dense()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for mine, oracle in zip(
            _run(attention, S, kv_heads, dtype, dtype, mask),
            _run(_oracle, S, kv_heads, dtype, dtype, mask),
            strict=True,
        ):
            torch.testing.assert_close(mine, oracle, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", [torch_attention, blocked_attention])
@pytest.mark.parametrize("width", [3, 11])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_values_may_be_narrower_or_wider_than_keys(attention: Callable, kv_heads: int, width: int) -> None:
    document = torch.arange(130).div(50, rounding_mode="floor")[None]
    for mask in (None, AttentionMask(document=document).dense()):
        for mine, oracle in zip(
            *(_run(way, 130, kv_heads, torch.float64, torch.float64, mask, width) for way in (attention, _oracle)),
            strict=True,
        ):
            torch.testing.assert_close(mine, oracle, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [torch_attention, blocked_attention])
@pytest.mark.parametrize("S", [5, 130])
def test_one_window_for_all_rows(attention: Callable, S: int) -> None:
    mask = AttentionMask(document=torch.zeros(1, S), window=3).dense()
    assert mask.shape == (1, 1, S, S)
    runs = (_run(one, S, 2, torch.float64, torch.float64, mask) for one in (attention, _oracle))
    for mine, oracle in zip(*runs, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=1e-12, atol=1e-12)


def test_keys_repeat_kv_are_those_that_heads_share() -> None:
    def copied(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return torch_attention(q, repeat_kv(k, H), repeat_kv(v, H), mask)

    mask = AttentionMask(document=torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, -1, -1]])).dense()
    shared, apart = (_run(attend, 5, 2, torch.float64, torch.float64, mask) for attend in (torch_attention, copied))
    for one, other in zip(shared, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [torch_attention, blocked_attention])
@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_bfloat16_values_keep_exact_scores(attention: Callable, sharpness: float) -> None:
    """Queries and keys are float32 after the rotation, and scores are computed in float32, with or without autocast.

    Autocast alone would round them: scores of up to 30, as the sharper ones are, would be wrong by 0.06.
    """

    def under_autocast(attend: Callable) -> Callable:
        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return attend(q * sharpness, k, v, mask)

        return attention

    def rounded(q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
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
