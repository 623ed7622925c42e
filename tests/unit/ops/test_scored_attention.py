"""Capped scores and sinks by their definition, head by head, and in flex_attention."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as module

from trainer.ops import block_attention
from trainer.ops.attention import blocked_attention, torch_attention
from trainer.ops.attention_mask import AttentionMask
from trainer.ops.block_attention import flex
from trainer.ops.scored_attention import ScoreRule, scored_attention

B, H, S, d = 2, 4, 11, 6

RULES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "capped": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "both": {"softcap": 0.7, "sinks": True},
}


def _mask(length: int = S) -> AttentionMask:
    document = torch.tensor([[0] * (length // 2) + [1] * (length - length // 2), [2] * length])
    return AttentionMask(document=document, window=length // 3)


def _run(
    attend: Callable[..., Tensor],
    rule: dict[str, Any],
    mask: object,
    length: int = S,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The result and every gradient."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, sinks = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((B, H, length, d), (B, 2, length, d), (B, 2, length, d + 2), (H,))
    )
    with_sinks = "sinks" in rule
    made = ScoreRule(softcap=rule.get("softcap"), sinks=sinks if with_sinks else None)
    y = attend(q, k, v, mask, made)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return [y, *torch.autograd.grad((y * weight).sum(), (q, k, v, sinks) if with_sinks else (q, k, v))]


def _oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: ScoreRule) -> Tensor:
    """Every weight by itself: exp(s) over the sum of those that the query sees, and of the sink's."""
    seen = torch.ones(S, S, dtype=torch.bool).tril()[None] if mask is None else mask[:, 0]
    rows = []
    for row in range(B):
        for head in range(H):
            kv = head * k.shape[1] // H
            for query in range(S):
                scores = k[row, kv] @ q[row, head, query] / math.sqrt(d)
                if rule.softcap is not None:
                    scores = rule.softcap * (scores / rule.softcap).tanh()
                exponents = scores.exp() * seen[row % len(seen), query]
                norm = exponents.sum() + (0 if rule.sinks is None else rule.sinks[head].exp())
                rows.append(exponents / norm @ v[row, kv])
    return torch.stack(rows).view(B, H, S, -1)


@pytest.mark.parametrize("attend", [scored_attention, torch_attention, blocked_attention])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_it_is_what_it_says(attend: Callable[..., Tensor], masked: bool, rule: dict[str, Any]) -> None:
    mask = _mask().dense() if masked else None
    for mine, expected in zip(_run(attend, rule, mask), _run(_oracle, rule, mask), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)


def test_without_a_rule_it_is_plain_attention() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: ScoreRule) -> Tensor:
        return torch_attention(q, k, v, mask)

    for mine, expected in zip(_run(scored_attention, {}, None), _run(plain, {}, None), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)


def test_bfloat16_has_scores_of_float32() -> None:
    exact = _run(scored_attention, RULES["both"], None, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = _run(scored_attention, RULES["both"], None, dtype=torch.bfloat16)
    assert rounded[0].dtype is torch.bfloat16
    assert (rounded[0] - exact[0]).norm() < 0.01 * exact[0].norm()
    far = torch.full((1, 1, 2, d), 100.0, dtype=torch.bfloat16)
    sunk = scored_attention(far, far, far, None, ScoreRule(sinks=torch.tensor([1e5])))
    assert torch.equal(sunk, torch.zeros_like(sunk)), "all of the weight is the sink's"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("rule", [RULES["capped"], RULES["both"]], ids=["capped", "both"])
def test_flex_attention_equals_it(rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch defines it: its fused kernels exist on GPUs alone."""
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(block_attention, "_fused", lambda: torch.compile(module.flex_attention, backend="aot_eager"))
    length = 150
    mask = _mask(length)
    found, expected = _run(flex, rule, mask.blocks(), length), _run(scored_attention, rule, mask.dense(), length)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)
    for mine, its in zip(_run(flex, rule, None), _run(scored_attention, rule, None), strict=True):
        assert torch.equal(mine, its), "a mask that is not of blocks"
