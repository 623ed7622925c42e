"""The model: a GPT-style decoder with dense and mixture-of-experts blocks, whole, on one device, nothing distributed.

Pre-norm blocks with RMSNorm (arXiv 1910.07467), rotary positions in the rotate-half layout (arXiv 2104.09864) and
grouped-query attention (arXiv 2305.13245): what Mixtral, OLMoE and Qwen3-MoE are made of.

# B rows, S tokens in a row, T = B * S, D d_model, V vocabulary, H query heads, Hkv key and value heads, d head width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batch import Batch
from trainer.models.config import ModelConfig
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer import MoELayer
from trainer.moe.routing import RoutingContext, RoutingOptions
from trainer.moe.stats import MoEStats
from trainer.ops.attention import CausalAttention, torch_attention
from trainer.ops.expert_ffn import activate
from trainer.ops.kernels import ExpertsKernel
from trainer.ops.noise import token_keys

_PLAIN = RoutingOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTOutput:
    """What one forward pass gives."""

    logits: Tensor | None
    """(B, S, V) float32, if asked for."""
    row_loss: Tensor
    """(B,) cross-entropy in nats, summed over each row's target tokens."""
    moe: tuple[MoEStats, ...]
    """One entry for each MoE layer."""

    @property
    def loss_sum(self) -> Tensor:
        """Cross-entropy in nats, summed over all target tokens."""
        return self.row_loss.sum()


@dataclass(slots=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens so far, for generation."""

    keys: Tensor
    """(num_layers, B, Hkv, capacity, d)."""
    values: Tensor
    length: int = 0
    """Tokens in the cache."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens (B, Hkv, S, d); return those of all tokens so far."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


ExtendCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""One layer's `KVCache.append`: keys and values of the new tokens in, those of all tokens out."""


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension; statistics in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width); the result is in the weight's dtype."""
        x = x.to(self.weight.dtype)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.qkv = nn.Linear(config.d_model, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.core_attention: CausalAttention = torch_attention

    def forward(self, x: Tensor, rotary: Tensor, extend: ExtendCache | None = None) -> Tensor:
        """Attend over x (B, S, D) and what is cached; rotary (2, S, d) holds cosines and sines."""
        B, S, _ = x.shape
        heads = self.qkv(x).view(B, S, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, S, d)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        # With a cache, one new token sees everything; several (the prompt) are only ever the first ones.
        y = self.core_attention(q, k, v) if extend is None else torch_attention(q, *extend(k, v))
        return self.out(y.transpose(1, 2).reshape(B, S, -1))


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Return (2, S, head_dim): cosines and sines of the rotary angles at positions (S,), computed in float64."""
    rate = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim)
    angle = positions.double()[:, None] * rate  # (S, d/2)
    return torch.stack([angle.cos(), angle.sin()]).repeat(1, 1, 2).to(dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2) of x (..., S, d) by its position's angle; the result is in the wider dtype."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class FeedForward(nn.Module):
    """A dense feed-forward network: SwiGLU or GELU, no biases."""

    def __init__(self, config: ModelConfig, d_ff: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.w_in = nn.Linear(config.d_model, 2 * d_ff if config.activation == "swiglu" else d_ff, bias=False)
        self.w_out = nn.Linear(d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., D)."""
        return self.w_out(activate(self.w_in(x), self.activation))


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, kernel: ExpertsKernel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = build_moe(config, layer, kernel) if layer in config.moe_layers else FeedForward(config, config.d_ff)
        self.compiled_attend: Callable[..., tuple[Tensor, Tensor]] | None = None

    def forward(
        self, x: Tensor, rotary: Tensor, context: RoutingContext, extend: ExtendCache | None = None
    ) -> tuple[Tensor, MoEStats | None]:
        """Return the residual stream (B, S, D) after this block, and what its MoE layer did."""
        # The compiled form is for whole rows: with a cache every call has another length, and would be compiled anew.
        attend = self.attend if self.compiled_attend is None or extend is not None else self.compiled_attend
        x, normed = attend(x, rotary, extend)
        if isinstance(self.ffn, MoELayer):
            y, stats = self.ffn(normed, context)
            return x + y, stats
        return x + self.ffn(normed), None

    def attend(self, x: Tensor, rotary: Tensor, extend: ExtendCache | None) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention, and its normalised copy for the feed-forward."""
        x = x + self.attention(self.attention_norm(x), rotary, extend)
        return x, self.ffn_norm(x)


def build_moe(config: ModelConfig, layer: int, kernel: ExpertsKernel) -> MoELayer:
    """Make the MoE layer of block `layer`; all experts are local until `parallelize` says otherwise."""
    moe = config.moe
    assert moe is not None, "a block is MoE only if the config has a moe section"
    return MoELayer(
        router=moe.router.build(d_model=config.d_model, num_experts=moe.num_experts, layer=layer),
        experts=Experts(moe.num_experts, config.d_model, moe.d_ff, activation=config.activation, kernel=kernel),
        dispatcher=LocalDispatcher(),
        capacity=moe.capacity,
        shared=FeedForward(config, moe.num_shared_experts * moe.d_ff) if moe.num_shared_experts else None,
    )


class GPT(nn.Module):
    """Token embedding, blocks, final norm, output head."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, experts_kernel: ExpertsKernel = "loop") -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer, experts_kernel) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        self.compiled_losses: Callable[..., tuple[Tensor, Tensor | None]] | None = None

    def forward(self, batch: Batch, options: RoutingOptions = _PLAIN, *, want_logits: bool = False) -> GPTOutput:
        """Return the losses of a micro-batch (and its logits), and what its MoE layers did."""
        context = routing_context(batch, options)
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        hidden, moe = self._hidden(batch.tokens, positions, context, cache=None)
        losses = self.compiled_losses or self.losses
        row_loss, logits = losses(hidden, batch.targets, batch.target_mask, want_logits)
        return GPTOutput(logits=logits, row_loss=row_loss, moe=moe)

    def losses(
        self, hidden: Tensor, targets: Tensor, target_mask: Tensor, want_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return each row's cross-entropy (B,) of the last residual stream (B, S, D), and the logits if asked for."""
        logits = self._logits(hidden)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (T,)
        row_loss = (nats.view(targets.shape) * target_mask).sum(1)
        return row_loss, logits if want_logits else None

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, V) of the token after `tokens` (B, S), which are appended to the cache.

        Several tokens at once are only possible on an empty cache. Dropless, without noise.
        """
        assert cache.length == 0 or tokens.shape[1] == 1, "a prompt goes into an empty cache, then one token at a time"
        B, S = tokens.shape
        positions = torch.arange(cache.length, cache.length + S, device=tokens.device)
        context = RoutingContext(
            token_ids=tokens.flatten(),
            valid=torch.ones(B * S, dtype=torch.bool, device=tokens.device),
            position=positions.repeat(B),
            sequence_index=torch.arange(B, device=tokens.device).repeat_interleave(S),
            num_sequences=B,
            dropless=True,
        )
        hidden, _ = self._hidden(tokens, positions, context, cache)
        cache.length += S
        return self._logits(hidden[:, -1])

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype) -> KVCache:
        """Return an empty cache for `capacity` tokens."""
        c = self.config
        shape = (c.num_layers, batch_size, c.num_kv_heads or c.num_heads, capacity, c.head_dim)
        device = self.embedding.weight.device
        return KVCache(
            keys=torch.zeros(shape, dtype=dtype, device=device), values=torch.zeros(shape, dtype=dtype, device=device)
        )

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def _hidden(
        self, tokens: Tensor, positions: Tensor, context: RoutingContext, cache: KVCache | None
    ) -> tuple[Tensor, tuple[MoEStats, ...]]:
        """Return the residual stream (B, S, D) after the last block, and what the MoE layers did."""
        x = self.embedding(tokens)  # (B, S, D)
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        moe = []
        for layer, block in enumerate(self.blocks):
            x, stats = block(x, rotary, context, None if cache is None else partial(cache.append, layer))
            if stats is not None:
                moe.append(stats)
        return x, tuple(moe)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(self.norm(hidden), weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # (..., V)


def routing_context(batch: Batch, options: RoutingOptions) -> RoutingContext:
    """Return what the routers may know of a micro-batch."""
    num_sequences, S = batch.tokens.shape
    seed = options.noise_seed
    keys = None if seed is None else token_keys(seed, batch.sample_id, batch.position).flatten()
    return RoutingContext(
        token_ids=batch.tokens.flatten(),
        valid=batch.valid.flatten(),
        position=batch.position.flatten(),
        sequence_index=torch.arange(num_sequences, device=batch.tokens.device).repeat_interleave(S),
        num_sequences=num_sequences,
        noise_key=keys,
        top_k=options.top_k,
        dropless=options.dropless,
    )


Role = Literal["embedding", "head", "norm", "router", "expert", "matrix"]


def parameter_role(name: str) -> Role:
    """Return what a parameter of GPT is for, from its name: initialisation and weight decay go by it."""
    if "norm" in name:
        return "norm"
    for part, role in (("embedding", "embedding"), ("head", "head"), ("router", "router"), ("experts", "expert")):
        if part in name.split("."):
            return role  # type: ignore[return-value]
    return "matrix"


def initial_std(name: str, config: ModelConfig) -> float:
    """Return the standard deviation of a weight's initial values.

    As in GPT-2, residual outputs are scaled by 1/sqrt(2 L).
    """
    writes_to_residual = name.endswith(("attention.out.weight", "w_out", "w_out.weight"))
    return config.init_std / math.sqrt(2 * config.num_layers) if writes_to_residual else config.init_std
