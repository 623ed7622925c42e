"""The transformer block: attention and a dense or mixture-of-experts feed-forward, each on a normalized copy.

Pre-normalized, like Mixtral and Qwen3-MoE.

# B rows, S tokens in a row, D d_model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from trainer.models.config import ModelConfig, Recompute
from trainer.models.feed_forward import FeedForward, SharedExperts
from trainer.models.kv_cache import LayerCache
from trainer.models.latent_attention import LatentAttention
from trainer.models.norm import RMSNorm
from trainer.models.recompute import checkpointed
from trainer.models.self_attention import Attention
from trainer.moe.build_router import build_router
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer import InFlight, MoE
from trainer.moe.routing import RoutingContext
from trainer.moe.stats import MoEStats
from trainer.ops.attention_mask import PreparedMask, RowMask
from trainer.ops.kernels import ExpertsKernel


class BlockInputs(NamedTuple):
    """Inputs of a block beside the residual stream of a micro-batch."""

    rotary: Tensor
    context: RoutingContext
    mask: PreparedMask | None = None
    extend: LayerCache | None = None


class Stream(NamedTuple):
    """Residual stream of a micro-batch before a block, to which the experts' outputs of the block before are coming."""

    x: Tensor
    """(B, S, D)."""
    coming: InFlight | None = None
    to: MoE | None = None
    """Their layer."""

    def arrived(self) -> tuple[Tensor, MoEStats | None]:
        """Wait for the outputs; return the whole stream (B, S, D) and the layer's statistics."""
        if self.coming is None or self.to is None:
            return self.x, None
        y, stats = self.to.finish(self.coming)
        return self.x + y, stats


class Block(nn.Module):
    """Transformer block: attention and feed-forward, each on a normalized copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, kernel: ExpertsKernel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, config.norm)
        latent = config.attention.latent
        self.attention = Attention(config) if latent is None else LatentAttention(config, latent)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps, config.norm)
        self.ffn = build_moe(config, layer, kernel) if config.has_experts(layer) else FeedForward(config, config.d_ff)
        self.compiled_attend: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.recompute: Recompute = "none"

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what is computed again in the backward pass."""
        self.recompute = self.attention.recompute = recompute
        if not isinstance(self.ffn, MoE):  # as a part of the whole block
            self.ffn.recompute = "none" if recompute == "block" else recompute
            return
        self.ffn.experts.recompute = recompute in ("experts", "block")
        if isinstance(self.ffn.shared, FeedForward):
            self.ffn.shared.recompute = recompute

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        context: RoutingContext,
        mask: PreparedMask | None = None,
        extend: LayerCache | None = None,
    ) -> tuple[Tensor, MoEStats | None]:
        """Return the residual stream (B, S, D) after this block, and its MoE layer's statistics."""
        # The compiled function is for whole rows: with a cache, each call has another length and would recompile it.
        attend = self.attend if self.compiled_attend is None or extend is not None else self.compiled_attend
        again = self.recompute == "block" and extend is None
        if isinstance(self.ffn, MoE):
            x, normed = checkpointed(attend, x, rotary, mask, extend, recompute=again)
            y, stats = self.ffn(normed, context)
            return x + y, stats
        return checkpointed(self._without_experts, attend, x, rotary, mask, extend, recompute=again), None

    def overlapped(
        self, streams: Sequence[Stream], inputs: Sequence[BlockInputs]
    ) -> tuple[list[Stream], list[MoEStats | None]]:
        """Run the block on some micro-batches, each of which is computed while the tokens of another one travel.

        Returns their residual streams, and the statistics of the layer before, which has finished only now.
        """
        attend, again = self.compiled_attend or self.attend, self.recompute == "block"
        begun, stats = list[Stream](), []
        for stream, (rotary, context, mask, extend) in zip(streams, inputs, strict=True):
            x, before = stream.arrived()
            stats.append(before)
            if isinstance(self.ffn, MoE):
                x, normed = checkpointed(attend, x, rotary, mask, extend, recompute=again)
                begun.append(Stream(x, self.ffn.begin(normed, context), self.ffn))
            else:
                x = checkpointed(self._without_experts, attend, x, rotary, mask, extend, recompute=again)
                begun.append(Stream(x))
        if not isinstance(self.ffn, MoE):
            return begun, stats
        sent = [stream.coming for stream in begun if stream.coming is not None]
        computed = self.ffn.compute([coming.rows for coming in sent])
        back = zip(begun, sent, computed, strict=True)
        return [stream._replace(coming=coming._replace(rows=rows)) for stream, coming, rows in back], stats

    def _without_experts(
        self, attend: Callable[..., tuple[Tensor, Tensor]], x: Tensor, rotary: Tensor, mask: Any, extend: Any
    ) -> Tensor:
        x, normed = attend(x, rotary, mask, extend)
        return x + self.ffn(normed, is_part=isinstance(mask, RowMask))

    def attend(
        self, x: Tensor, rotary: Tensor, mask: PreparedMask | None, extend: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention, and its normalized copy for the feed-forward."""
        return self.joined(x, self.attention(x, self.attention_norm, rotary, mask, extend))

    def joined(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream with attention's output y, and its normalized copy for the feed-forward."""
        x = x + y
        return x, self.ffn_norm(x)


def build_moe(config: ModelConfig, layer: int, kernel: ExpertsKernel) -> MoE:
    """Create the MoE layer of block `layer`, with all experts local; `parallelize` distributes them."""
    moe = config.moe
    assert moe is not None, "a block is MoE only if the config has a moe section"
    return MoE(
        router=build_router(moe.router, d_model=config.d_model, num_experts=moe.num_experts, layer=layer),
        experts=Experts(
            moe.num_experts,
            config.d_model,
            moe.d_ff,
            activation=config.activation_function,
            kernel=kernel,
            has_bias=moe.expert_bias,
        ),
        dispatcher=LocalDispatcher(),
        capacity=moe.capacity,
        shared=SharedExperts(config, moe.shared_width, has_gate=moe.shared_gate) if moe.num_shared_experts else None,
        layer=layer,
        needs_importance=moe.cv_squared.importance_coef > 0,
        needs_expert_similarity=moe.diversity_coef > 0,
    )
