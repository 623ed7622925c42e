"""The `model.attention` section. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, Problem
from trainer.config.numbers import Epsilon, Factor, Length, Width


class LatentAttentionConfig(Config):
    """Multi-head latent attention of DeepSeek-V2 and V3 (arXiv 2405.04434), with the names of its widths there.

    Keys and values of all heads are made from one latent per token, so that the cache holds `kv_lora_rank` +
    `qk_rope_head_dim` values per token and layer.
    """

    q_lora_rank: Width | None = None
    """Width of the compressed queries (V3: 1536). Null: queries are not compressed (V2-Lite)."""
    kv_lora_rank: Width = 512
    """Width of the latent from which the keys and values of all heads are made."""
    qk_nope_head_dim: Width = 128
    """Width of a query or key head's part without positions."""
    qk_rope_head_dim: Width = 64
    """Width of its part with rotary positions, which is even; keys have one for all heads."""
    v_head_dim: Width = 128
    """Width of a value head."""
    norm_eps: Epsilon = 1e-6
    """Added to the mean square in the RMSNorm of the latent and of the compressed queries; published models have 1e-6,
    whatever model.norm_eps is."""

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_values(self) -> int:
        """Values in the cache per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def weights(self, *, d_model: int, num_heads: int) -> int:
        """Count the parameters of one layer's attention, its inner norms included, biases not."""
        q, heads = self.q_lora_rank, num_heads * self.qk_head_dim
        queries = d_model * heads if q is None else q * (d_model + 1 + heads)
        of_latent = 1 + num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        outputs = num_heads * self.v_head_dim * d_model
        return queries + d_model * self.cached_values + self.kv_lora_rank * of_latent + outputs

    def problems(self) -> Iterator[Problem]:
        """Check that positions can be rotated."""
        width = self.qk_rope_head_dim
        if width % 2:
            yield Problem(
                "qk_rope_head_dim", f"{width} is odd, and rotary positions need an even width; use {width + 1}"
            )


class AttentionConfig(Config):
    """Attention beyond the numbers of heads, which are keys of `model`."""

    head_dim: Width | None = None
    """Width of one head, d, which is even. Null: d_model / num_heads."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen2-MoE, GLM-4-MoE); with latents, of what these are made from."""
    out_bias: bool = False
    """Bias of the output projection (GPT-OSS has both)."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """What model.qk_norm normalizes: each head (Qwen3), or all heads of a token together (OLMoE, MiniMax-M2)."""
    clip_qkv: Factor | None = None
    """Maximum size of the elements of queries, keys and values before the rotation (OLMoE). Null: none."""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head that is rotated: its first values, an even number (GLM-4-MoE: 0.5)."""
    scale: Factor | None = None
    """Multiplies the products of queries and keys (Gemma: query_pre_attn_scalar ** -0.5). Null: head_dim ** -0.5."""
    softcap: Factor | None = None
    """Limit c of the scores: s becomes c tanh(s / c) before the softmax (Gemma 2: 50). Null: none."""
    sinks: bool = False
    """A learned score of each head in the denominator of its softmax, so that a query may attend to nothing
    (GPT-OSS)."""
    window: Length | None = None
    """Keys that a query of a sliding layer sees: its own and those just before it. Null: all."""
    window_pattern: Annotated[tuple[Literal["sliding", "full"], ...], Field(strict=False, min_length=1)] = ("sliding",)
    """Which layers have the window, repeated from the first on: [sliding, full] for GPT-OSS, five times sliding and
    once full for Gemma 3. With an entry for each layer it is written out."""
    latent: LatentAttentionConfig | None = None
    """Multi-head latent attention (DeepSeek-V2, V3). Null: grouped-query attention."""

    @property
    def changes_scores(self) -> bool:
        """Whether torch's fused kernels cannot compute it."""
        return self.sinks or self.softcap is not None

    def problems(self) -> Iterator[Problem]:
        """Check that a window has layers and a pattern of layers a window."""
        if self.window is None and self.window_pattern != ("sliding",):
            yield Problem("window_pattern", "has no effect without a window; set attention.window or remove it")
        if self.window is not None and "sliding" not in self.window_pattern:
            yield Problem("window", "no layer has it by window_pattern; remove both")
