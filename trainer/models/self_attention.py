"""Causal grouped-query self-attention with rotary positions (arXiv 2305.13245, 2104.09864).

`qk_norm` normalizes each head separately, as in Qwen3-MoE (OLMoE normalizes over the whole width, which is a different
function).

# B rows, S tokens in a row, D d_model, H query heads, Hkv key and value heads, d head width.
"""

from torch import Tensor, nn

from trainer.models.config import ModelConfig, Recompute
from trainer.models.kv_cache import LayerCache
from trainer.models.norm import RMSNorm
from trainer.models.recompute import checkpointed
from trainer.ops.attention import CausalAttention, torch_attention
from trainer.ops.attention_mask import PreparedMask
from trainer.ops.rotary import rotate


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.qkv = nn.Linear(config.d_model, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.num_heads * self.head_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.core_attention: CausalAttention = torch_attention
        self.recompute: Recompute = "none"

    def forward(
        self, x: Tensor, norm: RMSNorm, rotary: Tensor, mask: PreparedMask | None, extend: LayerCache | None
    ) -> Tensor:
        """Attend over norm(x) (B, S, D), and over the cache if there is one.

        Args:
            x: the residual stream.
            norm: applied to it first.
            rotary: (2, ..., S, d) cosines and sines.
            mask: the keys visible to each query; None: all that are not later.
            extend: this layer's cache, to which the new keys and values are appended.
        """
        B, S, _ = x.shape
        again = self.recompute == "norms_and_activations" and extend is None
        heads = checkpointed(lambda x: self.qkv(norm(x)), x, recompute=again)
        # Without their norms, nothing of heads is saved anyway.
        q, k, v = checkpointed(self._rotated, heads, rotary, recompute=again and self.q_norm is not None)
        y = self.core_attention(q, k, v, mask) if extend is None else extend.attend(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, S, -1))

    def _rotated(self, heads: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, S, d), and keys and values (B, Hkv, S, d), from their projection (B, S, .)."""
        heads = heads.view(*heads.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, S, d)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotary), rotate(k, rotary), v
