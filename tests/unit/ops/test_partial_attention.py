"""Tests for attention to some keys: parts add up to the whole, forward and backward, by both implementations."""

import pytest
import torch

from trainer.ops.partial_attention import SomeKeys, add_part, attend_to_some, gradients_of_some
from trainer.ops.scored_attention import ScoreRule, scored_attention

B, H, HKV, S, D, V, CUT = 2, 4, 2, 24, 6, 8, 12
PLACE = torch.arange(S)


def _keys(
    k: torch.Tensor,
    v: torch.Tensor,
    queries: slice,
    seen: slice,
    document: torch.Tensor | None,
    window: int | None,
) -> SomeKeys:
    return SomeKeys(
        k=k[:, :, seen],
        v=v[:, :, seen],
        position=PLACE[seen],
        query_position=PLACE[queries],
        documents=None if document is None else (document[:, queries], document[:, seen]),
        window=window,
        sees_all=queries != seen,
        is_square=queries == seen,
    )


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["fused", "written out"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("has_documents", [False, True])
def test_parts_add_up_to_the_whole(softcap: float | None, window: int | None, has_documents: bool) -> None:
    torch.manual_seed(0)
    shapes = (B, H, S, D), (B, HKV, S, D), (B, HKV, S, V)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    document = torch.randint(0, 2, (B, S)).cumsum(1) if has_documents else None
    seen = (PLACE[:, None] >= PLACE)[None, None].expand(B, 1, S, S)
    seen = seen if window is None else seen & (PLACE[:, None] - PLACE < window)
    seen = seen if document is None else seen & (document[:, None, :, None] == document[:, None, None])
    expected = scored_attention(q, k, v, seen, ScoreRule(softcap=softcap))
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), grad)

    front, back = slice(0, CUT), slice(CUT, S)
    q, k, v = (x.detach() for x in (q, k, v))
    parts = [(queries, keys) for queries, keys in ((front, front), (back, back), (back, front))]
    out, lse = torch.empty_like(expected), torch.empty(B, H, S, dtype=torch.float64)
    for queries, keys in parts:
        some = _keys(k, v, queries, keys, document, window)
        found = attend_to_some(q[:, :, queries], some, softcap)
        if queries != keys:  # of which some queries see nothing, with a window
            found = add_part(out[:, :, queries], lse[:, :, queries], *found)
        out[:, :, queries], lse[:, :, queries] = found
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-12)
    mine = [torch.zeros_like(x) for x in (q, k, v)]
    for queries, keys in parts:
        some, at = _keys(k, v, queries, keys, document, window), [queries, keys, keys]
        of_grad, of_q, of_out, of_lse = (x[:, :, queries] for x in (grad, q, out, lse))
        found = gradients_of_some(of_grad, of_q, some, of_out, of_lse, softcap)
        for whole, where, part in zip(mine, at, found, strict=True):
            whole[:, :, where] += part
    torch.testing.assert_close(mine, list(gradients), rtol=0, atol=1e-12)
