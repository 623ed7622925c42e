"""Causal attention: torch's fused kernel, and a blocked implementation that is faster on the CPU.

Both take queries (B, H, S, d), keys (B, Hkv, S, d) and values (B, Hkv, S, v), where H / Hkv query heads share a key
head, and return (B, H, S, v) in the dtype of the values. Both disable autocast and choose their dtypes themselves. They
take dense masks (ops/attention_mask.py); None: all keys that are not later. Where scores are changed before the
softmax, both are ops/scored_attention.py. flex_attention is in ops/block_attention.py.

# B rows, H query heads, Hkv key and value heads, G = H / Hkv, N = B * Hkv, S tokens, d width of queries and keys,
# v of values, n queries per block.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.attention_mask import PreparedMask
from trainer.ops.scored_attention import ScoreRule, scored_attention

CausalAttention = Callable[[Tensor, Tensor, Tensor, PreparedMask | None, ScoreRule | None], Tensor]

_BLOCK = 64
"""Queries per block; a block skips the keys after its own end."""
_LONGEST = 512
"""Maximum tokens: beyond it the stored weights, S^2 / 2 per head, cost more memory than the speed is worth."""


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask | None = None, rule: ScoreRule | None = None
) -> Tensor:
    """Run torch's fused kernel, causal or with a mask (B, 1, S, keys).

    On the CPU bfloat16 is computed in float32, since the bfloat16 kernel takes 1.3 times as long, casts included.
    """
    assert mask is None or isinstance(mask, Tensor), "a dense mask"
    if rule is not None:
        return scored_attention(q, k, v, mask, rule)
    is_on_cpu, num_heads = v.device.type == "cpu", q.shape[1]
    dtype = torch.float32 if is_on_cpu and v.dtype is torch.bfloat16 else v.dtype
    if mask is not None and not is_on_cpu:
        # The only GPU kernel with a mask and shared key heads is the one that stores all S x S scores.
        k, v = repeat_kv(k, num_heads), repeat_kv(v, num_heads)
    with torch.autocast(q.device.type, enabled=False):  # it would cast everything to bfloat16 again
        y = F.scaled_dot_product_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            attn_mask=mask,
            is_causal=mask is None and q.shape[2] > 1,
            enable_gqa=k.shape[1] != num_heads,
        )
    return y.to(v.dtype)


def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """Return (B, H, S, d): keys or values (B, Hkv, S, d) repeated for each query head that shares them."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask | None = None, rule: ScoreRule | None = None
) -> Tensor:
    """Compute attention block by block, for the CPU and torch.compile, which fuses the operations between products.

    Scores and softmax are at least float32; all other products are in the dtype of the values.
    """
    assert mask is None or isinstance(mask, Tensor), "a dense mask"
    (B, H, S, d), (_, Hkv, _, width) = q.shape, v.shape
    if S > _LONGEST or rule is not None:
        return torch_attention(q, k, v, mask, rule)
    grouped = q.reshape(B * Hkv, H // Hkv, S, d), k.reshape(B * Hkv, S, d), v.reshape(B * Hkv, S, width)
    with torch.autocast(q.device.type, enabled=False):
        return _BlockedAttention.apply(*grouped, mask).view(B, H, S, width)


class _BlockedAttention(torch.autograd.Function):
    """q (N, G, S, d), k (N, S, d), v (N, S, v), mask (B, 1, S, S) or None -> (N, G, S, v).

    #  keys      0 .. 63   64 .. 127   128 .. 191
    #  block 0   causal
    #  block 1   all       causal
    #  block 2   all       all         causal
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        N, G, _, d = q.shape
        B = N if mask is None else len(mask)
        wide = torch.promote_types(v.dtype, torch.float32)
        scaled, keys = q.to(wide) * d**-0.5, k.to(wide)
        outs, weights = [], []
        for start, stop in _blocks(q):
            scores = torch.bmm(_rows(scaled, start, stop), keys[:, :stop].transpose(1, 2))  # (N, G n, stop)
            position = torch.arange(stop, device=q.device)
            hidden = position > position[start:, None] if mask is None else ~mask[:, :, start:stop, :stop]
            scores = scores.view(B, -1, stop - start, stop).masked_fill(hidden, float("-inf"))
            weights.append(torch.softmax(scores, dim=-1).to(v.dtype).view(N, -1, stop))
            outs.append(torch.bmm(weights[-1], v[:, :stop]).view(N, G, stop - start, -1))
        out = torch.cat(outs, dim=2)
        ctx.save_for_backward(q.to(v.dtype), k.to(v.dtype), v, out, *weights)
        ctx.dtypes = q.dtype, k.dtype
        return out

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *weights = ctx.saved_tensors
        N, G, _, d = q.shape
        wide = torch.promote_types(v.dtype, torch.float32)
        # Softmax backward: dL/ds = w * (dL/dw - sum_j w_j dL/dw_j); the sum equals output times its gradient.
        inner = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)  # (N, G, S, 1)
        grad_out = grad_out.to(v.dtype)
        grad_q = []
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        with torch.autocast(q.device.type, enabled=False):
            for (start, stop), w in zip(_blocks(q), weights, strict=True):
                grad = _rows(grad_out, start, stop)  # (N, G n, v)
                grad_w = torch.bmm(grad, v[:, :stop].transpose(1, 2))
                grad_scores = w.to(wide) * (grad_w.to(wide) - _rows(inner, start, stop)) * d**-0.5
                grad_scores = grad_scores.to(v.dtype)
                grad_q.append(torch.bmm(grad_scores, k[:, :stop]).view(N, G, -1, d))
                grad_k[:, :stop] += torch.bmm(grad_scores.transpose(1, 2), _rows(q, start, stop))
                grad_v[:, :stop] += torch.bmm(w.transpose(1, 2), grad)
        dtype_q, dtype_k = ctx.dtypes
        return torch.cat(grad_q, dim=2).to(dtype_q), grad_k.to(dtype_k), grad_v.to(v.dtype), None


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    """Return first and last + 1 query of each block of q (N, G, S, d)."""
    S = q.shape[2]
    return [(start, min(start + _BLOCK, S)) for start in range(0, S, _BLOCK)]


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Return a block of x (N, G, S, w) with its heads stacked: (N, G n, w)."""
    return x[:, :, start:stop].flatten(1, 2)
