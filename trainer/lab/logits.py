"""Logits that routers are compared on, with the routing context of their tokens.

# B sequences of S tokens, T = B * S, E experts, R warm-up batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.moe.routing import RoutingContext
from trainer.ops.noise import token_keys

LogitsKind = Literal["random", "skewed", "traced"]

_SPREAD = 2.0  # logit offset of the most popular expert of `skewed`; the least popular has its negative
_WARMUP_BATCHES = 10
_TOKEN_KINDS = 256  # synthetic token ids: byte values


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLogits:
    """Inputs to the router of one layer."""

    name: str
    measured: Tensor
    """(T, E) float32; choices are measured on these."""
    warmup: Sequence[Tensor]
    """R of (T', E), of the same kind, for routers that must learn a bias before they are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """Logits of one kind for the same tokens in one or several layers, with the training contexts of the tokens."""

    kind: LogitsKind
    layers: Sequence[LayerLogits]
    context: RoutingContext
    warmup_context: RoutingContext

    @property
    def num_experts(self) -> int:
        """E."""
        return self.layers[0].measured.shape[-1]


def synthetic_logits(
    kind: Literal["random", "skewed"], *, sequences: int, tokens: int, num_experts: int, seed: int
) -> Logits:
    """Draw logits for B `sequences` of S `tokens` from a standard normal distribution.

    `skewed` adds an offset to each expert's, from +2 to -2 in even steps and random order, so that a few experts are
    the best for most tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    offset = torch.zeros(num_experts)
    if kind == "skewed":
        order = torch.randperm(num_experts, generator=generator)
        offset = torch.linspace(_SPREAD, -_SPREAD, num_experts)[order]
    size = (sequences * tokens, num_experts)
    drawn = [torch.randn(size, generator=generator) + offset for _ in range(1 + _WARMUP_BATCHES)]
    ids = torch.randint(_TOKEN_KINDS, (sequences, tokens), generator=generator)
    context = training_context(ids, torch.ones_like(ids, dtype=torch.bool), seed=seed)
    layer = LayerLogits(name=kind, measured=drawn[0], warmup=drawn[1:])
    return Logits(kind=kind, layers=[layer], context=context, warmup_context=context)


def training_context(token_ids: Tensor, valid: Tensor, *, seed: int) -> RoutingContext:
    """Return the routing context of tokens (B, S) in a training step."""
    rows, columns = token_ids.shape
    row, position = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return RoutingContext(
        token_ids=token_ids.flatten(),
        valid=valid.flatten(),
        position=position,
        sequence_index=row,
        num_sequences=rows,
        num_valid=int(valid.sum()),
        noise_key=token_keys(seed, row, position),
    )
