"""The model: a GPT-style decoder with dense and mixture-of-experts blocks, on one device.

# B rows, S tokens in a row, T = B * S, D d_model, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batches.batch import Batch
from trainer.errors import ConfigError
from trainer.models.block import Block
from trainer.models.blocks import Blocks, MicroBatch
from trainer.models.config import ModelConfig, ShardKeeps
from trainer.models.kv_cache import KVCache
from trainer.models.layer_relay import LayerRelay
from trainer.models.lora import add_adapters
from trainer.models.norm import RMSNorm
from trainer.models.rotary_embedding import rotary_embedding
from trainer.models.routing_context import routing_context
from trainer.moe.layer import MoE
from trainer.moe.routing import RoutingContext, RoutingOptions, RowParts
from trainer.moe.stats import MoEStats, experts_of
from trainer.ops.attention_mask import AttentionMask, MaskForm, PreparedMask, RowMask
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.cross_entropy import HeadChunks, chunked_cross_entropy, chunked_log_probs
from trainer.ops.kernels import ExpertsKernel
from trainer.ops.softcap import softcapped

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
    vocab_z: tuple[float, Tensor] | None = None
    """Coefficient of the z-loss on logits, and their squared logsumexp, summed over all target tokens; None: off."""
    hidden: Tensor | None = None
    """(B, S, D) residual stream after the layers that were run, if they are not the last; `row_loss` is 0 then."""

    @property
    def loss_sum(self) -> Tensor:
        """Cross-entropy in nats, summed over all target tokens."""
        return self.row_loss.sum()


class GPT(nn.Module):
    """Token embedding, blocks, final norm, output head."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, experts_kernel: ExpertsKernel = "loop") -> None:
        super().__init__()
        self.config, self.num_tokens, self.vocab_size = config, vocab_size, config.vocab_size or vocab_size
        """Ids of the tokenizer, and rows of the embedding, which may be more."""
        if self.vocab_size < self.num_tokens:
            raise ConfigError(
                f"model.vocab_size: {self.vocab_size} rows, and the tokenizer has {self.num_tokens} ids; use at least "
                "as many, or leave it out"
            )
        rows = torch.empty(self.vocab_size, config.d_model)
        if not rows.is_meta:  # there, torch would import its compiler to draw nothing
            nn.init.normal_(rows)
        self.embedding = nn.Embedding.from_pretrained(rows, freeze=False)
        self.blocks = Blocks(Block(config, layer, experts_kernel) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, config.norm)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, self.vocab_size, bias=False)
        if config.lora is not None:
            add_adapters(self, config.lora, config.adapted())
        self.loss_chunk: int | None = None
        """Maximum tokens whose logits exist at once; None: all."""
        self.compiled_norm: Callable[[Tensor], Tensor] | None = None
        """If set, losses in chunks are compiled too."""
        self.shard_keeps: ShardKeeps = "gradients"
        """What stays whole between the micro-batches of a step, if weights are sharded."""
        self.overlaps = False
        """Whether a step runs two micro-batches at a time, by `overlapped`."""
        self.mask_form: MaskForm = "dense"
        """Form in which the blocks' kernel of attention takes a mask."""
        self.elsewhere = set[str]()  # weights and buffers that were given up
        self.row_parts: RowParts | None = None
        """Shows whole rows, where a batch has a part of each; None: rows are whole."""
        self.relay: LayerRelay | None = None
        """Passes tokens of a cache through layers that are elsewhere; None: all are here."""

    def forward(
        self,
        batch: Batch,
        options: RoutingOptions = _DEFAULTS,
        *,
        want_logits: bool = False,
        hidden: Tensor | None = None,
        layers: range | None = None,
    ) -> GPTOutput:
        """Return the losses of a micro-batch, its logits if `want_logits`, and its MoE statistics.

        Of some consecutive `layers`, `hidden` (B, S, D) is the residual stream before them, and what is returned is the
        one after them; the first ones need none, and the last ones return losses.
        """
        layers = range(self.config.num_layers) if layers is None else layers
        x, given = self._begin(batch, options, hidden)
        hidden, moe = self.blocks.run(x, given, self.config, layers)
        return self._output(hidden, moe, batch, layers, want_logits)

    def overlapped(
        self, batches: Sequence[Batch], options: RoutingOptions, *, hidden: Sequence[Tensor | None], layers: range
    ) -> list[GPTOutput]:
        """Return what `forward` does of two micro-batches; one is computed while tokens of the other travel."""
        begun = zip(batches, hidden, strict=True)
        xs, given = zip(*(self._begin(batch, options, before) for batch, before in begun), strict=True)
        found = zip(self.blocks.run_overlapped(xs, given, self.config, layers), batches, strict=True)
        return [self._output(after, moe, batch, layers, want_logits=False) for (after, moe), batch in found]

    def _begin(self, batch: Batch, options: RoutingOptions, hidden: Tensor | None) -> tuple[Tensor, MicroBatch]:
        """Return the residual stream (B, S, D) before the blocks, and what else they need."""
        if options.top_k is not None and self.config.moe is not None:
            self.config.moe.check_top_k(options.top_k)
        x = self.embedding(batch.tokens) if hidden is None else hidden
        # Positions are the same in every row; not 0 .. S - 1 in a part of longer rows.
        context = routing_context(batch, options, self.row_parts)
        positions = batch.position[0] if context.row_parts is None else context.row_parts.attended(batch.position[0])
        rotary = rotary_embedding(self.config, positions, x.dtype)
        return x, MicroBatch(rotary=rotary, context=context, masks=self._masks(batch))

    def _output(
        self, hidden: Tensor, moe: tuple[MoEStats, ...], batch: Batch, layers: range, want_logits: bool
    ) -> GPTOutput:
        """Return the residual stream (B, S, D) after some layers, or the losses of a micro-batch after the last."""
        coef, zeros = self.config.vocab_z_loss_coef, hidden.new_zeros(len(hidden))
        if layers.stop < self.config.num_layers:
            vocab_z = (coef, zeros.sum()) if coef > 0 else None  # the sums of all stages are all-reduced together
            return GPTOutput(logits=None, row_loss=zeros, moe=moe, vocab_z=vocab_z, hidden=hidden)
        row_loss, row_z, logits = self.losses(hidden, batch.targets, batch.target_mask, want_logits)
        vocab_z = None if row_z is None else (coef, row_z.sum())
        return GPTOutput(logits=logits, row_loss=row_loss, moe=moe, vocab_z=vocab_z)

    def losses(
        self, hidden: Tensor, targets: Tensor, target_mask: Tensor, want_logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return each row's loss from the final residual stream (B, S, D).

        Cross-entropy (B,); squared logsumexp of the logits (B,), if a loss uses it; the logits, if wanted.
        """
        needs_z = self.config.vocab_z_loss_coef > 0
        if self.loss_chunk is not None and not want_logits:
            normed = self.norm(hidden) if self.compiled_norm is None else self.compiled_norm(hidden)
            chunks = self._head_chunks(normed)
            weight = self._head_weight()
            row_loss, row_z = chunked_cross_entropy(normed, weight, targets, target_mask, chunks, needs_z=needs_z)
            return row_loss, row_z if needs_z else None, None
        logits = self._logits(hidden)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (T,)
        target_mask = target_mask.to(nats.dtype)
        row_loss = (nats.view(targets.shape) * target_mask).sum(1)
        row_z = (logits.logsumexp(-1).square() * target_mask).sum(1) if needs_z else None
        return row_loss, row_z, logits if want_logits else None

    def next_logits(self, tokens: Tensor, cache: KVCache, num_new: Tensor | None = None) -> Tensor:
        """Append new tokens to the cache and return the logits of each row's next token: one per id of the tokenizer.

        Dropless and without noise; a row is one document.

        Args:
            tokens: (B, S) new tokens of each row.
            cache: of B rows.
            num_new: (B,) number of tokens that are not padding; None: S. The logits of a row with 0 are meaningless.
        """
        if num_new is None:
            num_new = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        hidden, logits = self._append(tokens, cache, num_new), None
        if self.relay is None or self.relay.has_last:
            last = (num_new - 1).clamp(min=0)
            logits = self._logits(hidden[torch.arange(len(hidden), device=hidden.device), last])[:, : self.num_tokens]
        return self._shared(logits, torch.Size((len(tokens), self.num_tokens)))

    def target_log_probs(
        self, tokens: Tensor, targets: Tensor, cache: KVCache, num_new: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each target's log-probability (B, S) in nats, and whether it is the most probable token.

        Dropless and without noise. Arguments as in `next_logits`; targets (B, S) are the tokens after `tokens`.
        """
        hidden, log_probs, is_best = self._append(tokens, cache, num_new), None, None
        if self.relay is None or self.relay.has_last:
            normed = self.norm(hidden)
            log_probs, is_best = chunked_log_probs(normed, self._head_weight(), targets, self._head_chunks(normed))
        return self._shared(log_probs, tokens.shape), self._shared(is_best, tokens.shape, torch.bool)

    def new_cache(self, num_rows: int, capacity: int, *, keeps_experts: bool = False) -> KVCache:
        """Return an empty cache for `capacity` tokens per row; `keeps_experts` needs routers with a fixed k."""
        assert self.relay is None or not keeps_experts, "those of other stages are elsewhere"
        (_, block), weight, layers = next(self.blocks.numbered()), next(self.parameters()), self.blocks.numbers
        num_heads, widths = block.attention.cache_shape
        shape = len(layers), num_rows, capacity, num_heads
        # Not by `new_zeros`: of a sharded weight it makes a sharded tensor.
        keys, values = (torch.zeros((*shape, width), dtype=weight.dtype, device=weight.device) for width in widths)
        return KVCache(
            layers=layers,
            keys=keys,
            values=values,
            lengths=torch.zeros(num_rows, dtype=torch.int64, device=keys.device),
            experts=[] if keeps_experts else None,
        )

    def moe_layers(self) -> list[MoE]:
        """Return the MoE layers that are here, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def keep(self, layers: Collection[int]) -> None:
        """Give up all blocks but some, the embedding without the first, final norm and head without the last.

        An embedding that is also the head stays with the last.
        """
        whole = set(self.state_dict())
        self.blocks.keep(layers)
        is_first, is_last = 0 in layers, self.config.num_layers - 1 in layers
        if not is_first and not (is_last and self.head is None):
            del self.embedding
        if not is_last:
            del self.norm, self.head
        self.elsewhere = whole - set(self.state_dict())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def _append(self, tokens: Tensor, cache: KVCache, num_new: Tensor) -> Tensor:
        """Append new tokens to the cache and return their residual stream (B, S, D) after the last layer here."""
        B, S = tokens.shape
        extension = cache.extension(S, set(self.config.windows))
        context = RoutingContext(
            token_ids=tokens.flatten(),
            valid=(torch.arange(S, device=tokens.device) < num_new[:, None]).flatten(),
            position=extension.positions.flatten(),
            sequence_index=torch.arange(B, device=tokens.device).repeat_interleave(S),
            num_sequences=B,
            dropless=True,
            return_experts=cache.experts is not None,
            is_incremental=True,
        )
        # A head dimension of size 1, since each row has its own positions.
        rotary = rotary_embedding(self.config, extension.positions[:, None], next(self.parameters()).dtype)
        given = MicroBatch(rotary=rotary, context=context, extension=extension)
        relay, hidden, moe = self.relay, tokens, tuple[MoEStats, ...]()
        for layers in [range(self.config.num_layers)] if relay is None else relay.layers:
            hidden = relay.before(layers, tokens.shape) if relay and layers.start > 0 else self.embedding(tokens)
            hidden, moe = self.blocks.run(hidden, given, self.config, layers)
            if relay is not None and layers.stop < self.config.num_layers:
                relay.after(layers, hidden)
        if cache.experts is not None:
            cache.experts.append(experts_of(moe, tokens.shape))
        cache.grow(num_new, at_most=S)
        return hidden

    def _shared(self, found: Tensor | None, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        """Return what the rank with the last layer has found; in float32 or wider, unless a dtype is given."""
        if self.relay is None:
            assert found is not None, "all layers are here"
            return found
        wide = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        return self.relay.shared(found, shape, wide if dtype is None else dtype)

    def _masks(self, batch: Batch) -> dict[int | None, PreparedMask | None]:
        """Return the keys visible to each query, by the layers' windows; None: all that are not later."""
        # flex_attention, which changes scores, has no causal kernel of its own.
        is_causal = not self.config.document_mask and not (
            self.mask_form == "blocks" and self.config.attention.changes_scores
        )
        rows = batch.document_id if batch.row_document_id is None else batch.row_document_id
        found: dict[int | None, PreparedMask | None] = {}
        for window in dict.fromkeys(self.config.windows):
            narrow = window if window is not None and window < rows.shape[1] else None
            mask = None
            if not is_causal or narrow is not None:
                document = rows if self.config.document_mask else torch.zeros_like(rows[:1])
                mask = AttentionMask(document=document, window=narrow).prepared(self.mask_form)
            found[window] = mask if batch.row_document_id is None else RowMask(mask)
        return found

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight  # (V, D)

    def _head_chunks(self, normed: Tensor) -> HeadChunks:
        num_tokens = normed.shape[:-1].numel() if self.loss_chunk is None else self.loss_chunk
        is_compiled, softcap = self.compiled_norm is not None, self.config.logit_softcap
        return HeadChunks(num_tokens, compute_dtype(normed), is_compiled=is_compiled, softcap=softcap)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(self.norm(hidden), self._head_weight())
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return softcapped(wide, self.config.logit_softcap)  # (..., V)
