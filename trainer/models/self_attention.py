"""Causal grouped-query self-attention with rotary positions (arXiv 2305.13245, 2104.09864).

Queries and keys can be normalized, each head by itself or all heads of a token together, and only the first part of
each head rotated.

# B rows, S tokens in a row, D d_model, H query heads, Hkv key and value heads, d head width, r its rotated part.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.models.config import ModelConfig, Recompute
from trainer.models.head_share import HeadShare
from trainer.models.kv_cache import LayerCache
from trainer.models.norm import RMSNorm
from trainer.models.recompute import checkpointed
from trainer.models.token_exchange import TokenExchange, keep_cuts, project_in, project_out, with_adapters
from trainer.ops.attention import CausalAttention, torch_attention
from trainer.ops.attention_mask import PreparedMask, RowMask
from trainer.ops.cut import Cut
from trainer.ops.rotary import rotate
from trainer.ops.scored_attention import ScoreRule


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        own, kv_heads = config.attention, config.num_kv_heads or config.num_heads
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.widths = [heads * config.head_dim for heads in (config.num_heads, kv_heads, kv_heads)]  # of q, k and v
        self.qkv = nn.Linear(config.d_model, sum(self.widths), bias=own.qkv_bias)
        self.out = nn.Linear(self.widths[0], config.d_model, bias=own.out_bias)
        q_width, k_width = self.widths[:2] if own.qk_norm_over == "all_heads" else (config.head_dim, config.head_dim)
        self.norms_each_head = own.qk_norm_over == "head"
        self.q_norm = RMSNorm(q_width, config.norm_eps, config.norm) if config.qk_norm else None
        self.k_norm = RMSNorm(k_width, config.norm_eps, config.norm) if config.qk_norm else None
        self.clip = own.clip_qkv
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if own.sinks else None
        self.softcap = own.softcap
        self.score_scale = 1.0 if own.scale is None else own.scale * config.head_dim**0.5
        self.core_attention: CausalAttention = torch_attention
        self.recompute: Recompute = "none"
        self.exchange: TokenExchange | None = None
        """Exchanges tokens with the ranks that have the other heads; None: all heads are here."""
        self.compiled_heads: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def num_key_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.widths[1] // self.head_dim

    @property
    def cache_shape(self) -> tuple[int, tuple[int, int]]:
        """Number of heads in the cache, and the widths of their keys and values."""
        return self.num_key_heads, (self.head_dim, self.head_dim)

    def cut_of_heads(self, share: HeadShare) -> dict[str, Cut]:
        """Return the cuts of the parameters that belong to some heads of keys and values, and to their queries."""
        shared, d = self.num_heads // self.num_key_heads, self.head_dim  # queries of a head have the same keys
        ranges, start = [], 0
        for width, per_head, unit in zip(self.widths, (shared * d, d, d), (d, 1, 1), strict=True):
            begin, end = share.range_of(per_head, unit=unit)
            ranges.append((start + begin, start + end))
            start += width
        rows = Cut(0, start, tuple(ranges))
        cuts = {"qkv.weight": rows, "out.weight": Cut(1, self.widths[0], rows.ranges[:1])}
        if self.qkv.bias is not None:
            cuts["qkv.bias"] = rows
        if self.sinks is not None:
            cuts["sinks"] = Cut(0, self.num_heads, (share.range_of(shared),))
        return with_adapters(self, cuts)

    def keep_heads(self, share: HeadShare) -> None:
        """Keep only some heads of keys and values, and their queries; `exchange` makes shared heads whole."""
        keep_cuts(self, cuts := self.cut_of_heads(share))
        keys = (share.last - share.first) * self.head_dim
        self.widths = [cuts["out.weight"].width, keys, keys]
        self.num_heads = self.widths[0] // self.head_dim

    def forward(
        self,
        x: Tensor,
        norm: Callable[[Tensor], Tensor],
        rotary: Tensor,
        mask: PreparedMask | None,
        extend: LayerCache | None,
    ) -> Tensor:
        """Attend over norm(x) (B, S, D), and over the cache if there is one.

        Args:
            x: the residual stream.
            norm: applied to it first.
            rotary: (2, ..., S, r) cosines and sines, of all tokens that attention sees.
            mask: the keys visible to each query; None: all that are not later.
            extend: this layer's cache, to which the new keys and values are appended.
        """
        is_part, again = isinstance(mask, RowMask), self.recompute == "norms_and_activations" and extend is None
        projected = checkpointed(
            lambda x: project_in(self.qkv, norm(x), self.exchange, is_part=is_part), x, recompute=again
        )
        if self.exchange is not None:
            projected = self.exchange.whole_heads(projected, num_queries=self.widths[0])
        # Without a norm or a limit, nothing of them is saved anyway.
        again = again and (self.q_norm is not None or self.clip is not None)
        heads = self.heads if self.compiled_heads is None or extend is not None else self.compiled_heads
        q, k, v = checkpointed(heads, projected, rotary, recompute=again)
        changes_scores = self.softcap is not None or self.sinks is not None
        rule = ScoreRule(softcap=self.softcap, sinks=self.sinks) if changes_scores else None
        y = self.core_attention(q, k, v, mask, rule) if extend is None else extend.attend(q, k, v, rule)
        return project_out(self.out, y.transpose(1, 2).flatten(2), self.exchange, is_part=is_part)

    def heads(self, projected: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, S, d), and keys and values (B, Hkv, S, d), from their projection (B, S, .)."""
        q, k, v = projected.split(self.widths, dim=-1)
        if not self.norms_each_head:
            q, k = self._normed(q, k)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.norms_each_head:
            q, k = self._normed(q, k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        q, k = rotate(q, rotary), rotate(k, rotary)
        return (q if self.score_scale == 1 else q * self.score_scale), k, v  # kernels divide scores by the root of d

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))
