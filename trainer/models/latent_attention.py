"""Multi-head latent attention of DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437).

Keys and values of all heads are made from one narrow latent per token, and one rotated key is shared by all heads; the
cache holds these two only. Over a cache, the matrix that makes keys and values is applied to queries and outputs
instead (weight absorption), so that the latents themselves are the keys and values of all heads.

# B rows, S tokens in a row, T tokens in the cache, D d_model, H heads; widths of a head: n keys without and r with
# rotary positions, v values; c latent of keys and values.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.models.attention_config import LatentAttentionConfig
from trainer.models.config import ModelConfig, Recompute
from trainer.models.head_share import HeadShare
from trainer.models.kv_cache import LayerCache
from trainer.models.lora import whole_weight
from trainer.models.norm import RMSNorm
from trainer.models.recompute import checkpointed
from trainer.models.rotary_embedding import latent_score_scale
from trainer.models.token_exchange import TokenExchange, keep_cuts, project_out, with_adapters
from trainer.ops.attention import CausalAttention, torch_attention
from trainer.ops.attention_mask import PreparedMask, RowMask
from trainer.ops.cut import Cut
from trainer.ops.rotary import rotate


class LatentAttention(nn.Module):
    """Causal multi-head latent attention."""

    def __init__(self, config: ModelConfig, latent: LatentAttentionConfig) -> None:
        super().__init__()
        D, self.num_heads, self.latent = config.d_model, config.num_heads, latent
        c, r, queries = latent.kv_lora_rank, latent.qk_rope_head_dim, self.num_heads * latent.qk_head_dim
        self.widths = [latent.q_lora_rank or queries, c, r]
        self.qkv_a = nn.Linear(D, sum(self.widths), bias=config.attention.qkv_bias)
        self.q_norm = None if latent.q_lora_rank is None else RMSNorm(latent.q_lora_rank, latent.norm_eps, config.norm)
        self.q_b = None if latent.q_lora_rank is None else nn.Linear(latent.q_lora_rank, queries, bias=False)
        self.kv_norm = RMSNorm(c, latent.norm_eps, config.norm)
        self.kv_b = nn.Linear(c, self.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim), bias=False)
        self.out = nn.Linear(self.num_heads * latent.v_head_dim, D, bias=config.attention.out_bias)
        self.score_scale = latent_score_scale(config)
        self.core_attention: CausalAttention = torch_attention
        self.recompute: Recompute = "none"
        self.exchange: TokenExchange | None = None
        """Exchanges tokens with the ranks that have the other heads; None: all heads are here."""
        self.own_queries = slice(None)
        """Columns of the queries that belong to the heads here, where they are not compressed."""
        self.compiled_heads: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def num_key_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_heads

    @property
    def cache_shape(self) -> tuple[int, tuple[int, int]]:
        """Number of heads in the cache, and the widths of their entries: values are part of the keys."""
        return 1, (self.latent.cached_values, 0)

    def cut_of_heads(self, share: HeadShare) -> dict[str, Cut]:
        """Return the cuts of the parameters that belong to some heads; what makes latents is whole."""
        heads, latent = self.num_heads, self.latent

        def cut(dim: int, width: int) -> Cut:
            return Cut(dim, heads * width, (share.range_of(width),))

        cuts = {
            "kv_b.weight": cut(0, latent.qk_nope_head_dim + latent.v_head_dim),
            "out.weight": cut(1, latent.v_head_dim),
        }
        of_queries = {} if self.q_b is None else {"q_b.weight": cut(0, latent.qk_head_dim)}
        return with_adapters(self, {**of_queries, **cuts})

    def keep_heads(self, share: HeadShare) -> None:
        """Keep only some heads."""
        keep_cuts(self, self.cut_of_heads(share))
        self.num_heads = share.last - share.first
        if self.q_b is None:
            self.own_queries = slice(*share.range_of(self.latent.qk_head_dim))

    def forward(
        self,
        x: Tensor,
        norm: Callable[[Tensor], Tensor],
        rotary: Tensor,
        mask: PreparedMask | None,
        extend: LayerCache | None,
    ) -> Tensor:
        """Attend over norm(x) (B, S, D), and over the cache if there is one; arguments as in `Attention.forward`."""
        is_part, again = isinstance(mask, RowMask), self.recompute == "norms_and_activations" and extend is None
        projected = checkpointed(lambda x: self.qkv_a(norm(x)), x, recompute=again)
        if self.exchange is not None:  # narrower than x, so that no rank makes the latents of other ranks' tokens
            projected = self.exchange.gathered(projected, is_part=is_part)
        if extend is None:
            heads = self.heads if self.compiled_heads is None else self.compiled_heads
            y = self.core_attention(*heads(projected, rotary), mask, None)
        else:
            q, latent, k_rope = self._rotated(projected, rotary, again=False)
            y = self._attend_over_cache(q, self.kv_norm(latent), k_rope, extend)
        return project_out(self.out, y.transpose(1, 2).flatten(2), self.exchange, is_part=is_part)

    def heads(self, projected: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys (B, H, S, n + r), and values (B, H, S, v), from what `qkv_a` gives."""
        again = self.recompute == "norms_and_activations"
        q, latent, k_rope = self._rotated(projected, rotary, again=again)
        return q, *self._keys_and_values(checkpointed(self._expanded, latent, recompute=again), k_rope)

    def _rotated(self, projected: Tensor, rotary: Tensor, *, again: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, S, n + r), latents (B, S, c) and rotated keys (B, 1, S, r)."""
        q, latent, k_rope = projected.split(self.widths, dim=-1)
        q = q[..., self.own_queries]
        q_nope, q_rope = self._of_heads(checkpointed(self._queries, q, recompute=again)).split(
            [self.latent.qk_nope_head_dim, self.latent.qk_rope_head_dim], dim=-1
        )
        q = torch.cat([q_nope, rotate(q_rope, rotary).to(q.dtype)], dim=-1)
        q = q if self.score_scale == 1 else q * self.score_scale
        return q, latent, rotate(k_rope[:, None], rotary).to(k_rope.dtype)

    def _queries(self, q: Tensor) -> Tensor:
        return q if self.q_norm is None or self.q_b is None else self.q_b(self.q_norm(q))

    def _expanded(self, latent: Tensor) -> Tensor:
        return self.kv_b(self.kv_norm(latent))

    def _of_heads(self, x: Tensor) -> Tensor:
        """View (B, S, H w) as (B, H, S, w)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _keys_and_values(self, expanded: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (B, H, S, n + r) and values (B, H, S, v) of all heads."""
        k_nope, v = self._of_heads(expanded).split([self.latent.qk_nope_head_dim, self.latent.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, self.num_heads, -1, -1)], dim=-1), v

    def _attend_over_cache(self, q: Tensor, latent: Tensor, k_rope: Tensor, extend: LayerCache) -> Tensor:
        """Append normalized latents (B, S, c) and rotated keys (B, 1, S, r); return outputs (B, H, S, v).

        # q_n . (K l) = (K^T q_n) . l    and    sum_t w_t (V l_t) = V sum_t w_t l_t
        """
        (B, H, S, width), c = q.shape, self.latent.kv_lora_rank
        entries = torch.cat([latent[:, None], k_rope], dim=-1)  # (B, 1, S, c + r)
        seen, _ = extend.append(entries, entries[..., :0])  # (B, 1, T, c + r)
        if extend.visible is None:
            return torch_attention(q, *self._keys_and_values(self.kv_b(latent), k_rope))
        n = self.latent.qk_nope_head_dim
        to_keys, to_values = whole_weight(self.kv_b).view(H, -1, c).split([n, self.latent.v_head_dim], dim=1)
        q = torch.cat([q[..., :n] @ to_keys, q[..., n:]], dim=-1)  # (B, H, S, c + r)
        q = q * (q.shape[-1] / width) ** 0.5  # scores are divided by the root of the width of q
        # All heads have the same keys, so that their queries are more queries of one head.
        queries, visible = q.reshape(B, 1, H * S, -1), extend.visible.repeat(1, 1, H, 1)
        y = torch_attention(queries, seen, seen[..., :c], visible).view(B, H, S, c)
        return y @ to_values.transpose(1, 2)
