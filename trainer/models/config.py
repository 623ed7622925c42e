"""The `model` section: what is computed. Imports no torch."""

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from trainer.config.base import Config, Problem, divisors
from trainer.moe.config import MoEConfig


class ModelConfig(Config):
    """A GPT-style decoder: RMSNorm, rotary positions, grouped-query attention, dense and MoE feed-forward blocks."""

    num_layers: PositiveInt = 6
    """Transformer blocks, L."""
    d_model: PositiveInt = 256
    """Width of the residual stream, D."""
    num_heads: PositiveInt = 8
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads, shared by groups of query heads. Null: one for each query head."""
    d_ff: PositiveInt = 1024
    """Hidden width of the dense feed-forward blocks."""
    seq_len: PositiveInt = 256
    """Tokens in a training row, S."""
    attention_within: Literal["row", "document"] = "row"
    """How far back a token attends: to the beginning of its row, or no further than to that of its document there."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward kind, of dense blocks and experts alike."""
    qk_norm: bool = False
    """RMSNorm on every query and key head (Qwen3)."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as the output head too."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; layers that write to the residual stream get it over sqrt(2 L)."""
    moe: MoEConfig | None = MoEConfig()
    """Mixture-of-experts blocks. Null: a dense model."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks whose feed-forward is MoE."""
        if self.moe is None:
            return ()
        start, every = self.moe.first_dense_layers, self.moe.every
        return tuple(i for i in range(start, self.num_layers) if (i - start + 1) % every == 0)

    def problems(self) -> Iterator[Problem]:
        """Check widths against heads, and that an MoE model has MoE layers."""
        if self.d_model % self.num_heads:
            yield Problem(
                "num_heads",
                f"{self.num_heads} does not divide d_model {self.d_model}; use one of {divisors(self.d_model)}",
            )
        elif self.head_dim % 2:
            yield Problem(
                "num_heads",
                f"{self.num_heads} gives heads of width {self.head_dim}, and rotary positions need an even one; choose "
                "num_heads so that d_model / num_heads is even",
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            yield Problem(
                "num_kv_heads",
                f"{self.num_kv_heads} does not divide num_heads {self.num_heads}; "
                f"use one of {divisors(self.num_heads)}",
            )
        if self.moe is not None and not self.moe_layers:
            yield Problem(
                "moe",
                f"first_dense_layers {self.moe.first_dense_layers} and every {self.moe.every} leave no MoE layer among "
                f"num_layers {self.num_layers}; lower them, or set moe: null for a dense model",
            )
