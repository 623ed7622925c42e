"""Routers that choose what a benchmark tells them to, at the cost of a real one.

# T tokens, k experts per token, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.distributed.rank_layout import even_slice
from trainer.lab.costs.cost_options import RoutingKind
from trainer.moe.routers.top_k import TopKRouter

_FIRST, _NEVER = 12.0, -12.0
_GATE_STD = 1e-3  # of the gate's own weights: its product is computed, but decides nothing


@dataclass(frozen=True, slots=True)
class GivenLogits:
    """Draws router logits, new ones for each turn."""

    kind: RoutingKind
    num_experts: int
    seed: int
    traced: Sequence[Tensor] = ()
    """(T', E) logits of each layer of a run."""

    def draw(self, tokens: int, turn: int, *, layer: int = 0) -> Tensor:
        """Return (T, E) logits: the same for everyone who asks for this turn and layer.

        `balanced`: every expert is equally likely. `skewed`: half of all tokens choose expert 0, and the others never
        do. `traced`: those of a run's tokens, repeated or left out to fit, in random order.
        """
        draw = torch.Generator().manual_seed(hash((self.seed, turn, layer)) % 2**31)
        if self.kind == "traced":
            logits = self.traced[layer % len(self.traced)]
            return logits[torch.randint(len(logits), (tokens,), generator=draw)]
        logits = torch.randn(tokens, self.num_experts, generator=draw)
        if self.kind == "skewed" and self.num_experts > 1:
            half = torch.randperm(tokens, generator=draw)[: tokens // 2]
            logits[:, 0] = _NEVER
            logits[half, 0] = _FIRST
        return logits


class GivenRouter(TopKRouter):
    """Top-k router whose logits are those given to it, plus a negligible part of its own."""

    given: Tensor | None = None

    def make_gate(self, d_model: int, num_columns: int) -> None:
        """Create the parameters that `logits` uses."""
        super().make_gate(d_model, num_columns)
        nn.init.normal_(self.gate.weight, std=_GATE_STD)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (T, E) of tokens x (T, D), in at least float32."""
        assert self.given is not None, "the benchmark gives logits before it runs"
        return super().logits(x) + self.given


def given_router(d_model: int, *, num_experts: int, top_k: int) -> GivenRouter:
    """Return a router; a single weight is not normalized, which would make it the constant 1."""
    return GivenRouter(d_model=d_model, num_experts=num_experts, top_k=top_k, normalize=top_k > 1)


def choices(logits: Tensor, top_k: int) -> Tensor:
    """Return (T, k) int64 experts of each token."""
    return logits.topk(top_k, dim=-1).indices


def least_copies(expert_index: Tensor, *, num_experts: int, num_ranks: int, rank: int) -> int:
    """Return how often tokens (T, k) of a rank must be sent: once to each other rank that has any of their experts."""
    owner = torch.empty(num_experts, dtype=torch.int64)
    for other in range(num_ranks):
        first, end = even_slice(num_experts, num_ranks, other)
        owner[first:end] = other
    needs = torch.zeros(len(expert_index), num_ranks, dtype=torch.bool)
    needs.scatter_(1, owner[expert_index], True)
    needs[:, rank] = False
    return int(needs.sum())
