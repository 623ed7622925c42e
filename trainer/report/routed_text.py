"""Held-out text with the experts that a checkpoint chose for each token: what all findings are computed from.

# R rows of S tokens, N predicted tokens, L MoE layers, E experts, k the most experts of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.batches.batch import Batch
from trainer.engine.base import Engine
from trainer.moe.routing import RoutingDecision, RoutingOptions

NO_EXPERT = -1
"""Fills up the choices of a token that has fewer than k experts."""
Choices = NDArray[np.int16]
"""(N, k) a layer's experts of each token; `NO_EXPERT` is none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextRows:
    """Rows of held-out text, without padding rows."""

    tokens: NDArray[np.int32]
    """(R, S)."""
    document: NDArray[np.int64]
    """(R, S) number of the document in its domain; -1 for padding."""
    counted: NDArray[np.bool_]
    """(R, S) positions whose next token is predicted: the N tokens, row by row."""
    domain: NDArray[np.int64]
    """(R,) index of the domain."""
    number: NDArray[np.int64]
    """(R,) number of the row in its domain."""
    domains: tuple[str, ...]

    @classmethod
    def of(cls, batches: Sequence[Batch], domains: Sequence[str]) -> "TextRows":
        """Collect the rows of batches."""
        rows = [batch.sample_id[:, 0] >= 0 for batch in batches]

        def collect(name: str) -> NDArray[np.int64]:
            return torch.cat([getattr(b, name)[keep] for b, keep in zip(batches, rows, strict=True)]).cpu().numpy()

        return cls(
            tokens=collect("tokens").astype(np.int32),
            document=collect("document_id"),
            counted=collect("target_mask") > 0,
            domain=collect("domain")[:, 0],
            number=collect("sample_id")[:, 0],
            domains=tuple(domains),
        )

    @property
    def place(self) -> NDArray[np.int64]:
        """(N,) index of each token among the R * S positions."""
        return np.flatnonzero(self.counted)

    @property
    def token_domain(self) -> NDArray[np.int64]:
        """(N,) domain of each token."""
        return self.domain[self.place // self.tokens.shape[1]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """The experts of one checkpoint for some rows, dropless and without noise."""

    choices: tuple[Choices, ...]
    """Of each of the L layers."""
    loss_sum: NDArray[np.float64]
    """(G,) nats, by domain."""
    entropy: tuple[float, ...] | None
    """(L,) nats per token; None: a router has no probabilities."""


@torch.no_grad()
def route_rows(engine: Engine, batches: Sequence[Batch], num_domains: int) -> Routed:
    """Route batches, each of rows of one domain, by an engine in one process."""
    options = RoutingOptions(dropless=True, counts_targets_only=True, return_router_outputs=True)
    loss_sum = np.zeros(num_domains)
    parts: list[list[Choices]] = [[] for _ in engine.model.moe_layers()]
    entropy, tokens = [0.0] * len(parts), 0
    has_entropy = True
    for batch in batches:
        here = batch.to(engine.device)
        with engine.autocast():
            output = engine.model(here, options)
        counted = here.target_mask.flatten().bool()
        loss_sum[int(batch.domain[0, 0])] += float(output.row_loss.double().sum())
        tokens += int(counted.sum())
        for layer, stats in enumerate(output.moe):
            assert stats.routed is not None, "they are requested"
            parts[layer].append(choices_of(stats.routed.decision)[counted.cpu().numpy()])
            has_entropy &= stats.entropy_sum is not None
            if stats.entropy_sum is not None:
                entropy[layer] += float(stats.entropy_sum.double().sum())
    return Routed(
        choices=tuple(_joined(part) for part in parts),
        loss_sum=loss_sum,
        entropy=tuple(total / max(1, tokens) for total in entropy) if has_entropy and parts else None,
    )


def assignments(choices: Choices) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return token and expert of each assignment of a layer."""
    token, slot = np.nonzero(choices != NO_EXPERT)
    return token, choices[token, slot].astype(np.int64)


def choices_of(decision: RoutingDecision) -> Choices:
    """Return the experts (T, k) of a decision, without null experts."""
    kept = decision.kept & (decision.expert_index < decision.num_experts)
    token = decision.token_index[kept].cpu().numpy()  # ascending
    expert = decision.expert_index[kept].cpu().numpy()
    order = np.argsort(token, kind="stable")
    token, expert = token[order], expert[order]
    count = np.bincount(token, minlength=decision.num_tokens)
    first = np.cumsum(count) - count
    found = np.full((decision.num_tokens, max(1, count.max(initial=0))), NO_EXPERT, dtype=np.int16)
    found[token, np.arange(len(token)) - first[token]] = expert
    return found


def _joined(parts: Sequence[Choices]) -> Choices:
    """Join the choices of batches, which may have different k."""
    width = max(part.shape[1] for part in parts)
    wide = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=NO_EXPERT) for p in parts]
    return np.concatenate(wide)
