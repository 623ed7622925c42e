"""Attention whose scores are changed before the softmax, written out: torch's fused kernels cannot.

All scores and weights are stored, in at least float32. On CUDA flex_attention does the same without storing them
(ops/block_attention.py).

# B rows, H query heads, Hkv key and value heads, G = H / Hkv, S queries, T keys, d width of queries and keys, v of
# values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.ops.softcap import softcapped


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """Changes of the scores before they are weights, besides their scale and the mask."""

    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap), before the mask (Gemma 2)."""
    sinks: Tensor | None = None
    """(H,) score of a key without a value that every query of a head sees, so that weights sum to less than 1
    (GPT-OSS)."""


def scored_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: ScoreRule) -> Tensor:
    """Return (B, H, S, v) in the dtype of the values, from q (B, H, S, d), k (B, Hkv, T, d) and v (B, Hkv, T, v).

    The mask (B or 1, 1, S, T) marks the keys visible to each query; None: all that are not later, of T = S.
    """
    (B, H, S, d), (_, Hkv, T, _) = q.shape, k.shape
    wide, G = torch.promote_types(v.dtype, torch.float32), H // Hkv
    seen = torch.ones(S, T, dtype=torch.bool, device=q.device).tril() if mask is None else mask[:, :, None]
    with torch.autocast(q.device.type, enabled=False):
        queries = q.to(wide).reshape(B, Hkv, G * S, d)  # heads that share a key head as more queries of it
        scores = (queries * d**-0.5 @ k.to(wide).transpose(-1, -2)).view(B, Hkv, G, S, T)
        scores = softcapped(scores, rule.softcap).masked_fill(~seen, float("-inf"))
        if rule.sinks is not None:
            sinks = rule.sinks.to(wide).view(Hkv, G, 1, 1).expand(B, -1, -1, S, 1)
            scores = torch.cat([scores, sinks], dim=-1)  # (B, Hkv, G, S, T + 1)
        weights = torch.softmax(scores, dim=-1)[..., :T].reshape(B, Hkv, G * S, T)
        return (weights @ v.to(wide)).view(B, H, S, -1).to(v.dtype)
