"""The `model` section. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Field

from trainer.config.base import Config, Problem, Renamed, divisors
from trainer.config.numbers import Coefficient, Epsilon, Factor, Layers, Length, VocabSize, Width
from trainer.models.attention_config import AttentionConfig, LatentAttentionConfig
from trainer.models.lora_config import LoRAConfig
from trainer.models.projections import (
    Projection,
    grouped_query_projections,
    latent_projections,
    network_projections,
)
from trainer.models.rope_scaling_config import DynamicRopeScaling, RopeScaling, YarnRopeScaling
from trainer.moe.config import MoEConfig
from trainer.ops.activations import Activation, ClampedSwiGLU, hidden_width

ShardKeeps = Literal["nothing", "gradients", "weights"]
"""What stays whole between the micro-batches of a step, if weights are sharded; `parallel.shard_keeps`."""
Recompute = Literal["none", "experts", "norms_and_activations", "block"]
"""Activations that are computed again in the backward pass instead of being saved."""
Norm = Literal["rms", "rms_plus_one"]
"""How a norm's weight is used: x / rms(x) times it, or times 1 + it."""
NORM_START: Final[dict[Norm, float]] = {"rms": 1.0, "rms_plus_one": 0.0}
"""Initial weights of norms, with which they multiply by 1."""
MAX_WEIGHTS: Final = 2**50
"""Maximum parameters of a model, about 10^15: more than any machine can hold."""


class Weights(NamedTuple):
    """Parameter counts, without the few of the routers."""

    dense: int
    """Parameters outside the routed experts, which every rank has."""
    expert: int
    """Parameters of one routed expert, summed over all MoE layers."""


class ModelConfig(Config):
    """A GPT-style decoder: RMSNorm, rotary positions, grouped-query or latent attention, dense and MoE blocks."""

    old_names = {"attention_within": Renamed("document_mask", {"row": False, "document": True})}  # noqa: RUF012

    num_layers: Layers = 6
    """Transformer blocks, L."""
    d_model: Width = 256
    """Width of the residual stream, D."""
    num_heads: Width = 8
    """Query heads."""
    num_kv_heads: Width | None = None
    """Key and value heads, shared by groups of query heads. Null: one per query head."""
    d_ff: Width = 1024
    """Hidden width of the dense feed-forward blocks."""
    seq_len: Length = 256
    """Tokens in a training row, S."""
    document_mask: bool = False
    """Attend only within a token's own document; false: back to the beginning of the row."""
    activation: Literal["swiglu", "gelu", "clamped_swiglu"] = "swiglu"
    """Feed-forward kind of dense blocks and experts. `clamped_swiglu`: (up + 1) * gate * sigmoid(alpha * gate) of
    values within a limit (GPT-OSS)."""
    swiglu_alpha: Factor = 1.702
    """Alpha of `clamped_swiglu`."""
    swiglu_limit: Factor = 7.0
    """Limit of `clamped_swiglu`: of the gate from above, and of up on both sides."""
    qk_norm: bool = False
    """RMSNorm on queries and keys: on every head (Qwen3), or as attention.qk_norm_over says."""
    rope_theta: Annotated[float, Field(ge=1, le=1e15)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies for longer texts. Null: none."""
    attention: AttentionConfig = AttentionConfig()
    """Attention beyond the numbers of heads."""
    norm: Norm = "rms"
    """RMSNorm times its weight, or times 1 + its weight (Gemma)."""
    norm_eps: Epsilon = 1e-6
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as output head."""
    vocab_size: VocabSize | None = None
    """Rows of the embedding and the output head: more than the tokenizer's ids, which no text uses and which are never
    generated. Null: one per id."""
    logit_softcap: Factor | None = None
    """Limit c of the output head's logits: x becomes c tanh(x / c) (Gemma 2: 30). Null: none."""
    init_std: Annotated[float, Field(gt=0, le=1e3)] = 0.02
    """Standard deviation of initial weights; for layers that write to the residual stream, divided by sqrt(2 L)."""
    vocab_z_loss_coef: Coefficient = 0.0
    """Weight of the mean squared logsumexp of the vocabulary's logits (PaLM, arXiv 2204.02311: 1e-4). 0 turns it
    off."""
    moe: MoEConfig | None = MoEConfig()
    """Mixture-of-experts blocks. Null: a dense model."""
    lora: LoRAConfig | None = None
    """Low-rank adapters, which learn in place of the weights. Null: none."""

    @property
    def merged(self) -> "ModelConfig":
        """The model whose weights are those of this one with its adapters."""
        return self.model_copy(update={"lora": None})

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention.head_dim or self.d_model // self.num_heads

    @property
    def head_widths(self) -> tuple[int, int]:
        """Widths of a head's keys and values in attention."""
        latent = self.attention.latent
        return (self.head_dim, self.head_dim) if latent is None else (latent.qk_head_dim, latent.v_head_dim)

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head that has rotary positions."""
        latent = self.attention.latent
        return int(self.head_dim * self.attention.rotary_fraction) if latent is None else latent.qk_rope_head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Keys that a query sees in each layer; None: all."""
        own = self.attention
        kinds = [own.window_pattern[layer % len(own.window_pattern)] for layer in range(self.num_layers)]
        return tuple(own.window if kind == "sliding" else None for kind in kinds)

    @property
    def activation_function(self) -> Activation:
        """The activation with its numbers."""
        if self.activation == "clamped_swiglu":
            return ClampedSwiGLU(self.swiglu_alpha, self.swiglu_limit)
        return self.activation

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks whose feed-forward is MoE."""
        return tuple(layer for layer in range(self.num_layers) if self.has_experts(layer))

    def has_experts(self, layer: int) -> bool:
        """Return whether the feed-forward of block `layer` is MoE."""
        if self.moe is not None and self.moe.layers is not None:
            return layer in self.moe.layers
        if self.moe is None or layer < self.moe.first_dense_layers:
            return False
        return (layer - self.moe.first_dense_layers + 1) % self.moe.every == 0

    def projections(self) -> list[Projection]:
        """Return the matrices of the blocks that can have adapters."""
        D, heads, latent, num_moe = self.d_model, self.num_heads, self.attention.latent, len(self.moe_layers)
        if latent is None:
            widths = {"queries": heads * self.head_dim, "keys": (self.num_kv_heads or heads) * self.head_dim}
            found = list(grouped_query_projections(d_model=D, **widths, count=self.num_layers))
        else:
            found = list(latent_projections(latent, d_model=D, num_heads=heads, count=self.num_layers))
        networks = [("dense", self.d_ff, self.num_layers - num_moe)]
        if self.moe is not None:
            shared = num_moe if self.moe.num_shared_experts else 0
            networks += [("shared", self.moe.shared_width, shared), ("experts", self.moe.d_ff, num_moe)]
        for group, width, count in networks:
            hidden = hidden_width(width, self.activation_function)
            found += network_projections(group, d_model=D, width=width, hidden=hidden, count=count)
        return found

    def adapted(self) -> list[Projection]:
        """Return the matrices of the blocks that have adapters."""
        return [] if self.lora is None else self.lora.chosen(self.projections())

    def weights(self, *, vocab_size: int) -> Weights:
        """Count the parameters without building the model; `vocab_size` is that of the tokenizer."""
        vocab_size = self.vocab_size or vocab_size
        D, L, num_moe = self.d_model, self.num_layers, len(self.moe_layers)
        dense = L * (self.attention_weights() + 2 * D) + D + (1 if self.tie_embeddings else 2) * vocab_size * D
        dense += (L - num_moe) * self.feed_forward_weights(self.d_ff)
        of_adapters = Weights(0, 0) if self.lora is None else Weights(*self.lora.weights(self.projections()))
        dense += of_adapters.dense
        if self.moe is None:
            return Weights(dense, 0)
        dense += num_moe * (self.feed_forward_weights(self.moe.shared_width) + (D if self.moe.shared_gate else 0))
        biases = hidden_width(self.moe.d_ff, self.activation_function) + D if self.moe.expert_bias else 0
        return Weights(dense, num_moe * (self.feed_forward_weights(self.moe.d_ff) + biases) + of_adapters.expert)

    @property
    def cut_weights(self) -> int:
        """Weights of the matrices that tensor-parallel ranks cut, in all layers."""
        matrices = [one for one in self.projections() if one.group in ("attention", "dense") and one.name != "qkv_a"]
        return sum(one.rows * one.columns * one.count for one in matrices)

    def activations(self, *, vocab_size: int, num_rows: int, loss_chunk: int | None) -> int:
        """Return a lower bound of the values in memory at once: residual streams, and the logits of a chunk."""
        tokens, vocab_size = num_rows * self.seq_len, self.vocab_size or vocab_size
        with_logits = tokens if loss_chunk is None else min(tokens, loss_chunk)
        return tokens * self.num_layers * self.d_model + with_logits * vocab_size

    def attention_weights(self) -> int:
        """Return the weights of a block's attention."""
        D, own, latent = self.d_model, self.attention, self.attention.latent
        if latent is not None:
            weights = latent.weights(d_model=D, num_heads=self.num_heads)
            qkv = (latent.q_lora_rank or self.num_heads * latent.qk_head_dim) + latent.cached_values
        else:
            q, kv = self.num_heads * self.head_dim, (self.num_kv_heads or self.num_heads) * self.head_dim
            weights, qkv = 2 * D * (q + kv), q + 2 * kv
            if self.qk_norm:
                weights += 2 * self.head_dim if own.qk_norm_over == "head" else q + kv
        return weights + own.qkv_bias * qkv + own.out_bias * D + own.sinks * self.num_heads

    def feed_forward_weights(self, d_ff: int) -> int:
        """Return the weights of a network of this width."""
        return self.d_model * (hidden_width(d_ff, self.activation_function) + d_ff)

    def problems(self) -> Iterator[Problem]:
        """Check widths against heads, that an MoE model has MoE layers, and the total size."""
        weights = self.weights(vocab_size=1)
        total = weights.dense + (self.moe.num_experts if self.moe is not None else 0) * weights.expert
        if total > MAX_WEIGHTS:
            yield Problem(
                "",
                f"{total:.1e} parameters are more than a machine can count; use at most {MAX_WEIGHTS:.1e}: lower "
                "num_layers, d_model, d_ff or moe.num_experts",
            )
        yield from self._attention_problems()
        if self.lora is not None:
            for problem in self.lora.problems_in(self.projections()):
                yield Problem(f"lora.{problem.key}", problem.message)
        given, plain = (self.swiglu_alpha, self.swiglu_limit), ClampedSwiGLU()
        if self.activation != "clamped_swiglu" and given != (plain.alpha, plain.limit):
            key = "swiglu_alpha" if self.swiglu_alpha != plain.alpha else "swiglu_limit"
            what = f"{getattr(self, key):g} has no effect with activation: {self.activation}"
            yield Problem(key, f"{what}; use clamped_swiglu, or leave it out")
        if self.moe is not None and self.moe.layers is not None and self.moe.layers[-1] >= self.num_layers:
            what = f"{self.moe.layers[-1]} is beyond the last of num_layers {self.num_layers}"
            yield Problem("moe.layers", f"{what}; use 0 to {self.num_layers - 1}")
        elif self.moe is not None and not self.moe_layers:
            yield Problem(
                "moe",
                f"first_dense_layers {self.moe.first_dense_layers} and every {self.moe.every} leave no MoE layer among "
                f"num_layers {self.num_layers}; lower them, or set moe: null for a dense model",
            )

    def _attention_problems(self) -> Iterator[Problem]:
        if self.attention.latent is not None:
            yield from self._latent_problems(self.attention.latent)
        else:
            yield from self._head_problems()
            if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
                what = f"{self.num_kv_heads} does not divide num_heads {self.num_heads}"
                yield Problem("num_kv_heads", f"{what}; use one of {divisors(self.num_heads, near=self.num_kv_heads)}")
        if (kinds := len(self.attention.window_pattern)) > self.num_layers:
            what = f"{kinds} kinds for num_layers {self.num_layers}"
            yield Problem("attention.window_pattern", f"{what}; use at most one for each layer")
        if isinstance(self.rope_scaling, DynamicRopeScaling) and self.rotary_width == 2:
            why = "dynamic scales all pairs of a head but its first, and here it has one"
            yield Problem("rope_scaling.kind", f"{why}; use another kind, or wider heads")
        if isinstance(self.rope_scaling, YarnRopeScaling) and self.rope_theta == 1:
            yield Problem("rope_scaling.kind", "yarn needs pairs of different frequencies; use a rope_theta above 1")

    def _latent_problems(self, latent: LatentAttentionConfig) -> Iterator[Problem]:
        given = {"num_kv_heads": self.num_kv_heads, "qk_norm": self.qk_norm or None}
        meaningful = {"latent", "qkv_bias", "out_bias", "window", "window_pattern"}
        own = self.attention.model_dump(exclude_defaults=True, exclude=meaningful)
        for key, value in (given | {f"attention.{key}": value for key, value in own.items()}).items():
            if value is not None:
                yield Problem(
                    key,
                    f"{value} has no meaning with latent attention, whose heads have the widths of "
                    "attention.latent; leave it out, or set attention.latent: null",
                )
        if self.attention.qkv_bias and latent.q_lora_rank is None:
            yield Problem(
                "attention.qkv_bias",
                "latent attention has biases of compressed queries only; set attention.latent.q_lora_rank",
            )

    def _head_problems(self) -> Iterator[Problem]:
        if self.attention.head_dim is None and self.d_model % self.num_heads:
            allowed = divisors(self.d_model, near=self.num_heads)
            what = f"{self.num_heads} does not divide d_model {self.d_model}"
            yield Problem("num_heads", f"{what}; use one of {allowed}, or set attention.head_dim")
        elif self.attention.head_dim is None and self.head_dim % 2:
            yield Problem(
                "num_heads",
                f"{self.num_heads} gives heads of width {self.head_dim}, and rotary positions need an even one; choose "
                "num_heads so that d_model / num_heads is even",
            )
        elif self.head_dim % 2:
            yield Problem(
                "attention.head_dim",
                f"{self.head_dim} is odd, and rotary positions need an even width; use {self.head_dim + 1}",
            )
        else:
            width = self.rotary_width
            if width % 2 or width == 0:
                yield Problem(
                    "attention.rotary_fraction",
                    f"{self.attention.rotary_fraction} of a head of width {self.head_dim} is {width}, and rotary "
                    f"positions need an even width; use {(width + 1) // 2 * 2 or 2} / {self.head_dim}",
                )
