"""The logits that routers are compared on, and the tokens that they are of.

# B sequences of S tokens, T = B * S, E experts, R rehearsals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.moe.routing import RoutingContext
from trainer.ops.noise import token_keys

LogitsKind = Literal["random", "skewed", "traced"]

_SPREAD = 2.0
"""Skew of `skewed`: the favourite expert's logits are higher than the middle by this, the least favourite's lower."""
_REHEARSALS = 10
_TOKEN_KINDS = 256
"""Number of synthetic token ids: one for each byte value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLogits:
    """Inputs to the router of one layer."""

    name: str
    measured: Tensor
    """(T, E) float32, on which choices are measured."""
    rehearsed: Sequence[Tensor]
    """R of (T', E), others of the same kind, for routers that must have seen some before they are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """Logits of one kind, of one layer or several, all of the same tokens."""

    kind: LogitsKind
    layers: Sequence[LayerLogits]
    context: RoutingContext
    """Context of the measured tokens, as in training."""
    rehearsal: RoutingContext
    """Context of the warm-up tokens."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.layers[0].measured.shape[-1]


def made_up(kind: Literal["random", "skewed"], *, sequences: int, tokens: int, num_experts: int, seed: int) -> Logits:
    """Draw logits from a standard normal distribution; `skewed` ones have an offset for each expert as well.

    Offsets lead from +2 to -2 in even steps, in an order that the seed draws: a few experts are nearly everybody's
    best.

    Args:
        kind: whether there are offsets.
        sequences: B.
        tokens: S.
        num_experts: E.
        seed: of all that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    offset = torch.zeros(num_experts)
    if kind == "skewed":
        order = torch.randperm(num_experts, generator=generator)
        offset = torch.linspace(_SPREAD, -_SPREAD, num_experts)[order]
    drawn = [torch.randn(sequences * tokens, num_experts, generator=generator) + offset for _ in range(1 + _REHEARSALS)]
    ids = torch.randint(_TOKEN_KINDS, (sequences, tokens), generator=generator)
    context = training_context(ids, torch.ones_like(ids, dtype=torch.bool), seed=seed)
    layer = LayerLogits(name=kind, measured=drawn[0], rehearsed=drawn[1:])
    return Logits(kind=kind, layers=[layer], context=context, rehearsal=context)


def training_context(token_ids: Tensor, valid: Tensor, *, seed: int) -> RoutingContext:
    """Return the context of rows of tokens (B, S) in a step of training."""
    rows, columns = token_ids.shape
    row, position = (
        index.flatten() for index in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    )
    return RoutingContext(
        token_ids=token_ids.flatten(),
        valid=valid.flatten(),
        position=position,
        sequence_index=row,
        num_sequences=rows,
        noise_key=token_keys(seed, row, position),
    )
