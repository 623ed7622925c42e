"""Compile the operations around matrix products, block by block.

    ranks with whole rows and heads    norm, attention, sum, norm: one graph
    ranks that share rows or heads     norm | qkv | heads | exchange | kernel | exchange | out | sum, norm

Where tokens or heads are exchanged within a block, only what is between the exchanges is compiled: a graph has no
message in it, so that the flight recorder and the watchdog see each, and gathers of tokens are repeated in the backward
pass as without compilation.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from trainer.models.block import Block
from trainer.models.feed_forward import FeedForward
from trainer.models.gpt import GPT
from trainer.models.kv_cache import LayerCache
from trainer.ops.attention import CausalAttention, blocked_attention
from trainer.ops.attention_mask import PreparedMask
from trainer.ops.expert_ffn import activate
from trainer.parallel.memory_budget import inductor_within_budget


def compile_glue(model: GPT) -> None:
    """Compile norms, attention and losses for static shapes, and activations for any number of rows."""
    activation = torch.compile(activate, dynamic=True)
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.activate = activation
    for block in cast(Iterable[Block], model.blocks):
        if model.row_parts is not None:
            block.compiled_attend = _AttendInParts(block)
            continue
        # Only attention in blocks keeps softmax weights; other kernels' graphs are left as they are.
        is_blocked = block.attention.core_attention is blocked_attention
        backend = inductor_within_budget if is_blocked else "inductor"
        block.compiled_attend = torch.compile(block.attend, dynamic=False, backend=backend)
    if model.config.num_layers - 1 in model.blocks.numbers:
        model.compiled_norm = torch.compile(model.norm, dynamic=False)
    for moe in model.moe_layers():
        moe.experts.is_compiled = True


def compile_kernel(model: GPT) -> None:
    """Compile the kernel of attention by itself, before exchanges are put around it; others than blocks are fused."""
    kernel: CausalAttention = torch.compile(blocked_attention, dynamic=False, backend=inductor_within_budget)
    for block in cast(Iterable[Block], model.blocks):
        if block.attention.core_attention is blocked_attention:
            block.attention.core_attention = kernel


class _AttendInParts:
    """`Block.attend` of compiled parts, between which ranks exchange tokens or heads."""

    def __init__(self, block: Block) -> None:
        self._attention = block.attention
        self._attention.compiled_heads = torch.compile(self._attention.heads, dynamic=False)
        self._norm = torch.compile(block.attention_norm.forward, dynamic=False)
        self._joined = torch.compile(block.joined, dynamic=False)

    def __call__(
        self, x: Tensor, rotary: Tensor, mask: PreparedMask | None, extend: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        return self._joined(x, self._attention(x, self._norm, rotary, mask, extend))
