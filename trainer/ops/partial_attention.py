"""Attention of some queries of a row to some of its keys, in forms that add up over all keys.

Outputs come with the logarithm of what they are normalized by (lse), by which outputs over other keys are weighted.
Given the lse over all keys, the gradients over some of them are exact, and sums over all keys are those of the whole.
No scores are stored: they are computed again in the backward pass. On the CPU by torch's fused kernel; else, and where
scores are capped, written out for some queries at a time.

# B rows, H query heads, Hkv key and value heads, G = H / Hkv, S queries, T keys, n queries at a time, d width of
# queries and keys, v of values.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 128
"""Queries whose scores exist at once."""
_MASKED_AT_ONCE = 512
"""Queries whose mask exists at once, for the fused kernel."""
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, kw_only=True)
class SomeKeys:
    """Some keys and values of a row, and what the queries that meet them see of them."""

    k: Tensor
    """(B, Hkv, T, d), of the dtype of queries and values."""
    v: Tensor
    """(B, Hkv, T, v)."""
    position: Tensor
    """(T,) place in the row; like the next two, only used if there is a mask."""
    query_position: Tensor
    """(S,)."""
    documents: tuple[Tensor, Tensor] | None = None
    """Documents of queries (B or 1, S) and keys (B or 1, T); None: of one document."""
    window: int | None = None
    """Maximum keys that a query sees, itself and those just before it."""
    sees_all: bool = False
    """No key is later than any query: without documents and a window there is no mask."""
    is_square: bool = False
    """Queries and keys are the same tokens in order: without documents and a window the mask is causal."""

    @property
    def is_plain(self) -> bool:
        """Whether the mask is causal or none."""
        return self.documents is None and self.window is None and (self.sees_all or self.is_square)

    def seen(self, first: int, end: int) -> Tensor:
        """Return (B or 1, 1, n, T) bool: the keys that queries first .. end - 1 see."""
        ahead = self.query_position[first:end, None] - self.position
        seen = (ahead >= 0)[None]
        if self.window is not None:
            seen = seen & (ahead < self.window)
        if self.documents is not None:
            of_queries, of_keys = self.documents
            seen = seen & (of_queries[:, first:end, None] == of_keys[:, None])
        return seen[:, None]


def attend_to_some(q: Tensor, keys: SomeKeys, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return outputs (B, H, S, v) and their lse (B, H, S), both at least float32: 0 and -inf where nothing is seen."""
    if q.device.type == "cpu" and softcap is None:
        parts = [_fused_part(q, keys, *bounds) for bounds in _fused_bounds(q, keys)]
    else:
        parts = [_plain_part(q, keys, softcap, *bounds) for bounds in _bounds(q.shape[2], _AT_ONCE)]
    outs, norms = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(norms, dim=2)


def gradients_of_some(
    grad: Tensor, q: Tensor, keys: SomeKeys, out: Tensor, lse: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what these keys add to the gradient of q, and the gradients of k and v; all at least float32.

    `grad`, `out` (B, H, S, v) and `lse` (B, H, S) are those over all keys.
    """
    wide = out.dtype
    grad_k, grad_v = torch.zeros_like(keys.k, dtype=wide), torch.zeros_like(keys.v, dtype=wide)
    grad_q = []
    if q.device.type == "cpu" and softcap is None:
        for first, end in _fused_bounds(q, keys):
            (own, width), mask = _padded(q, keys, first, end)
            picked = [_pad(x[:, :, first:end], width) for x in (grad.to(q.dtype), out.to(q.dtype))]
            norm = lse[:, :, first:end].contiguous()
            parts = _fused_backward(
                picked[0], *own, picked[1], norm, 0.0, keys.is_plain and keys.is_square, attn_mask=mask, scale=_scale(q)
            )
            grad_q.append(parts[0][..., : q.shape[-1]].to(wide))
            grad_k += parts[1][..., : grad_k.shape[-1]]
            grad_v += parts[2][..., : grad_v.shape[-1]]
        return torch.cat(grad_q, dim=2), grad_k, grad_v
    delta = (grad * out).sum(-1)
    (B, H, _, d), Hkv = q.shape, grad_k.shape[1]
    k, v = keys.k.to(wide), keys.v.to(wide)
    for first, end in _bounds(q.shape[2], _AT_ONCE):
        rows, scores, slope = _scores(q, k, keys, softcap, first, end)  # (B, Hkv, G n, d), (B, Hkv, G, n, T)
        weights = torch.exp(scores - _of_heads(lse, Hkv, first, end)[..., None])
        mine = _of_heads(grad, Hkv, first, end).flatten(2, 3)  # (B, Hkv, G n, v)
        grad_weights = (mine @ v.transpose(-1, -2)).view(weights.shape)
        grad_scores = weights * (grad_weights - _of_heads(delta, Hkv, first, end)[..., None])
        grad_scores = (grad_scores if slope is None else grad_scores * slope).flatten(2, 3) * _scale(q)
        grad_v += weights.flatten(2, 3).transpose(-1, -2) @ mine
        grad_k += grad_scores.transpose(-1, -2) @ rows
        grad_q.append((grad_scores @ k).view(B, H, end - first, d))
    return torch.cat(grad_q, dim=2), grad_k, grad_v


def add_part(out: Tensor, lse: Tensor, more: Tensor, its_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs over two sets of keys from those over each; of the first set every query sees some."""
    total = torch.logaddexp(lse, its_lse)
    first, second = ((each - total).exp()[..., None] for each in (lse, its_lse))
    return out * first + more * second, total


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _bounds(S: int, n: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + n, S)) for first in range(0, S, n))


def _of_heads(x: Tensor, num_key_heads: int, first: int, end: int) -> Tensor:
    """Return (B, Hkv, G, n, ...) of x (B, H, S, ...)."""
    return x[:, :, first:end].unflatten(1, (num_key_heads, -1))


def _scores(
    q: Tensor, k: Tensor, keys: SomeKeys, softcap: float | None, first: int, end: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return queries (B, Hkv, G n, d), scores (B, Hkv, G, n, T), and the slope of the cap; -inf for what is hidden."""
    of_heads = _of_heads(q, k.shape[1], first, end)
    rows = of_heads.flatten(2, 3).to(k.dtype)
    scores = (rows * _scale(q) @ k.transpose(-1, -2)).view(*of_heads.shape[:-1], -1)
    slope = None
    if softcap is not None:
        share = torch.tanh(scores / softcap)
        scores, slope = softcap * share, 1 - share.square()
    if not (keys.is_plain and keys.sees_all):
        scores = scores.masked_fill(~keys.seen(first, end)[:, :, None], float("-inf"))
    return rows, scores, slope


def _plain_part(q: Tensor, keys: SomeKeys, softcap: float | None, first: int, end: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    _, scores, _ = _scores(q, keys.k.to(wide), keys, softcap, first, end)
    top = scores.amax(-1, keepdim=True)
    top = top.where(top > float("-inf"), 0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)  # (B, Hkv, G, n, 1)
    out = (weights.flatten(2, 3) @ keys.v.to(wide)).view(*total.shape[:-1], -1)
    lse = (top + total.log()).squeeze(-1)
    return (out / total.clamp(min=torch.finfo(wide).tiny)).flatten(1, 2), lse.flatten(1, 2)


def _fused_bounds(q: Tensor, keys: SomeKeys) -> Iterator[tuple[int, int]]:
    return _bounds(q.shape[2], q.shape[2] if keys.is_plain else _MASKED_AT_ONCE)


def _padded(
    q: Tensor, keys: SomeKeys, first: int, end: int
) -> tuple[tuple[tuple[Tensor, Tensor, Tensor], int], Tensor | None]:
    """Return queries, keys and values of one width, which the fused kernel needs, and its mask to add to scores."""
    width = max(q.shape[-1], keys.v.shape[-1])
    q, k, v = (_pad(x, width) for x in (q[:, :, first:end], keys.k, keys.v))
    if keys.is_plain:
        return ((q, k, v), width), None
    seen = keys.seen(first, end)
    return ((q, k, v), width), torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, float("-inf"))


def _fused_part(q: Tensor, keys: SomeKeys, first: int, end: int) -> tuple[Tensor, Tensor]:
    (own, _), mask = _padded(q, keys, first, end)
    out, lse = _fused(*own, 0.0, keys.is_plain and keys.is_square, attn_mask=mask, scale=_scale(q))
    if mask is not None:  # the kernel's lse of a query that sees nothing is 0
        lse = lse.masked_fill((mask == float("-inf")).all(-1), float("-inf"))
    return out[..., : keys.v.shape[-1]], lse


def _pad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
