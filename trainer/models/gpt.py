"""The model: a GPT-style decoder with dense and mixture-of-experts blocks, on one device.

Pre-norm blocks with RMSNorm (arXiv 1910.07467), rotary positions and grouped-query attention (arXiv 2305.13245), like
Mixtral and Qwen3-MoE. `qk_norm` normalizes each head separately, as in Qwen3-MoE (OLMoE normalizes over the whole
width, which is a different function).

# B rows, S tokens in a row, T = B * S, D d_model, V vocabulary, H query heads, Hkv key and value heads, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batches.batch import Batch
from trainer.models.config import ModelConfig
from trainer.models.kv_cache import CachedAttention, Extension, KVCache
from trainer.moe.build_router import build_router
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer import MoE
from trainer.moe.routing import RoutingContext, RoutingOptions
from trainer.moe.stats import MoEStats
from trainer.ops.attention import CausalAttention, document_mask, torch_attention
from trainer.ops.expert_ffn import activate
from trainer.ops.kernels import ExpertsKernel
from trainer.ops.noise import token_keys
from trainer.ops.rotary import rotary_table, rotate

_DEFAULTS = RoutingOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTOutput:
    """Output of a forward pass."""

    logits: Tensor | None
    """(B, S, V) float32, if requested."""
    row_loss: Tensor
    """(B,) cross-entropy in nats, summed over each row's target tokens."""
    moe: tuple[MoEStats, ...]
    """Statistics of each MoE layer."""

    @property
    def loss_sum(self) -> Tensor:
        """Cross-entropy in nats, summed over all target tokens."""
        return self.row_loss.sum()


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., width); the result is in the weight's dtype."""
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

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, extend: CachedAttention | None) -> Tensor:
        """Attend over x (B, S, D), and over the cache if there is one.

        Args:
            x: the normalized residual stream.
            rotary: (2, ..., S, d) cosines and sines.
            mask: (B, 1, S, S) bool, the keys visible to each query; None: causal.
            extend: attention over this layer's cache, to which the new keys and values are appended.
        """
        B, S, _ = x.shape
        heads = self.qkv(x).view(B, S, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, S, d)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        y = self.core_attention(q, k, v, mask) if extend is None else extend(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, S, -1))


class FeedForward(nn.Module):
    """Dense feed-forward network: SwiGLU or GELU, without biases."""

    def __init__(self, config: ModelConfig, d_ff: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.w_in = nn.Linear(config.d_model, 2 * d_ff if config.activation == "swiglu" else d_ff, bias=False)
        self.w_out = nn.Linear(d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., D)."""
        return self.w_out(activate(self.w_in(x), self.activation))


class Block(nn.Module):
    """Transformer block: attention and feed-forward, each on a normalized copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, kernel: ExpertsKernel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = build_moe(config, layer, kernel) if config.has_experts(layer) else FeedForward(config, config.d_ff)
        self.compiled_attend: Callable[..., tuple[Tensor, Tensor]] | None = None

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        context: RoutingContext,
        mask: Tensor | None = None,
        extend: CachedAttention | None = None,
    ) -> tuple[Tensor, MoEStats | None]:
        """Return the residual stream (B, S, D) after this block, and its MoE layer's statistics."""
        # The compiled function is for whole rows: with a cache, each call has another length and would recompile it.
        attend = self.attend if self.compiled_attend is None or extend is not None else self.compiled_attend
        x, normed = attend(x, rotary, mask, extend)
        if isinstance(self.ffn, MoE):
            y, stats = self.ffn(normed, context)
            return x + y, stats
        return x + self.ffn(normed), None

    def attend(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None, extend: CachedAttention | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention, and its normalized copy for the feed-forward."""
        x = x + self.attention(self.attention_norm(x), rotary, mask, extend)
        return x, self.ffn_norm(x)


def build_moe(config: ModelConfig, layer: int, kernel: ExpertsKernel) -> MoE:
    """Create the MoE layer of block `layer`, with all experts local; `parallelize` distributes them."""
    moe = config.moe
    assert moe is not None, "a block is MoE only if the config has a moe section"
    return MoE(
        router=build_router(moe.router, d_model=config.d_model, num_experts=moe.num_experts, layer=layer),
        experts=Experts(moe.num_experts, config.d_model, moe.d_ff, activation=config.activation, kernel=kernel),
        dispatcher=LocalDispatcher(),
        capacity=moe.capacity,
        shared=FeedForward(config, moe.num_shared_experts * moe.d_ff) if moe.num_shared_experts else None,
        layer=layer,
        needs_importance=moe.cv_squared.importance_coef > 0,
        needs_expert_similarity=moe.diversity_coef > 0,
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

    def forward(self, batch: Batch, options: RoutingOptions = _DEFAULTS, *, want_logits: bool = False) -> GPTOutput:
        """Return the losses of a micro-batch, its logits if `want_logits`, and its MoE statistics."""
        if options.top_k is not None and self.config.moe is not None:
            self.config.moe.check_top_k(options.top_k)
        context = routing_context(batch, options)
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        mask = document_mask(batch.document_id) if self.config.document_mask else None
        hidden, moe = self._hidden(batch.tokens, positions, context, mask=mask)
        losses = self.compiled_losses or self.losses
        row_loss, logits = losses(hidden, batch.targets, batch.target_mask, want_logits)
        return GPTOutput(logits=logits, row_loss=row_loss, moe=moe)

    def losses(
        self, hidden: Tensor, targets: Tensor, target_mask: Tensor, want_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return each row's cross-entropy (B,), and the logits if wanted, from the final residual stream (B, S, D)."""
        logits = self._logits(hidden)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (T,)
        row_loss = (nats.view(targets.shape) * target_mask).sum(1)
        return row_loss, logits if want_logits else None

    def next_logits(self, tokens: Tensor, cache: KVCache, num_new: Tensor | None = None) -> Tensor:
        """Append new tokens to the cache and return the logits (B, V) of each row's next token.

        Dropless and without noise; a row is one document.

        Args:
            tokens: (B, S) new tokens of each row.
            cache: of B rows.
            num_new: (B,) number of tokens that are not padding; None: S. The logits of a row with 0 are meaningless.
        """
        if num_new is None:
            num_new = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        hidden = self._append(tokens, cache, num_new)
        last = (num_new - 1).clamp(min=0)
        return self._logits(hidden[torch.arange(len(hidden), device=hidden.device), last])

    def target_log_probs(
        self, tokens: Tensor, targets: Tensor, cache: KVCache, num_new: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each target's log-probability (B, S) in nats, and whether it is the most probable token.

        Dropless and without noise. Arguments as in `next_logits`; targets (B, S) are the tokens after `tokens`.
        """
        logits = self._logits(self._append(tokens, cache, num_new))  # (B, S, V)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return -nats.view(targets.shape), logits.argmax(-1) == targets

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """Return an empty cache for `capacity` tokens per row."""
        c, weight = self.config, self.embedding.weight
        shape = (c.num_layers, num_rows, capacity, c.num_kv_heads or c.num_heads, c.head_dim)
        return KVCache(
            keys=torch.zeros(shape, dtype=weight.dtype, device=weight.device),
            values=torch.zeros(shape, dtype=weight.dtype, device=weight.device),
            lengths=torch.zeros(num_rows, dtype=torch.int64, device=weight.device),
        )

    def moe_layers(self) -> list[MoE]:
        """Return the MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def _append(self, tokens: Tensor, cache: KVCache, num_new: Tensor) -> Tensor:
        """Append new tokens to the cache and return their residual stream (B, S, D)."""
        B, S = tokens.shape
        extension = cache.extension(S)
        context = RoutingContext(
            token_ids=tokens.flatten(),
            valid=(torch.arange(S, device=tokens.device) < num_new[:, None]).flatten(),
            position=extension.positions.flatten(),
            sequence_index=torch.arange(B, device=tokens.device).repeat_interleave(S),
            num_sequences=B,
            dropless=True,
            is_incremental=True,
        )
        # A head dimension of size 1, since each row has its own positions.
        hidden, _ = self._hidden(tokens, extension.positions[:, None], context, extension=extension)
        cache.grow(num_new, at_most=S)
        return hidden

    def _hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: RoutingContext,
        *,
        mask: Tensor | None = None,
        extension: Extension | None = None,
    ) -> tuple[Tensor, tuple[MoEStats, ...]]:
        """Return the residual stream (B, S, D) after the last block, and the MoE layers' statistics."""
        x = self.embedding(tokens)  # (B, S, D)
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        moe = []
        for layer, block in enumerate(self.blocks):
            extend = None if extension is None else partial(extension.attend, layer)
            x, stats = block(x, rotary, context, mask, extend)
            if stats is not None:
                moe.append(stats)
        return x, tuple(moe)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(self.norm(hidden), weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # (..., V)


def routing_context(batch: Batch, options: RoutingOptions) -> RoutingContext:
    """Return the routers' context for a micro-batch."""
    num_sequences, S = batch.tokens.shape
    seed = options.noise_seed
    keys = None if seed is None else token_keys(seed, batch.sample_id, batch.position).flatten()
    return RoutingContext(
        token_ids=batch.tokens.flatten(),
        valid=batch.valid.flatten(),
        position=batch.position.flatten(),
        sequence_index=torch.arange(num_sequences, device=batch.tokens.device).repeat_interleave(S),
        num_sequences=num_sequences,
        num_valid=batch.num_valid,
        noise_key=keys,
        top_k=options.top_k,
        dropless=options.dropless,
        counted=batch.target_mask.flatten() if options.counts_targets_only else None,
        return_router_outputs=options.return_router_outputs,
    )
