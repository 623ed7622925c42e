"""Statistics for losses over a global batch: sums over its tokens, for every layer.

# B sequences, E experts, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trainer.moe.layer_options import BalanceConfig
from trainer.moe.stats import MoEStats
from trainer.ops.tensor_sums import TensorSums


@dataclass(frozen=True, slots=True, kw_only=True)
class _LayerSums(TensorSums):
    """Base class of sums whose first dimension counts layers."""

    def layer(self, i: int) -> Self:
        """Return the sums of one layer."""
        return self.mapped(lambda part: part[i])


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStats(_LayerSums):
    """Sums over a set of tokens, without gradient; without the leading L for a single layer."""

    counts: Tensor
    """(L, E) int64 assignments counted by the balance loss; (L, E + 1) with null experts."""
    importance: Tensor | None = None
    """(L, E) combine weights; like `load`, None if no loss needs them."""
    load: Tensor | None = None
    """(L, E) smooth counts."""

    @classmethod
    def of(cls, moe: Sequence[MoEStats], balance: BalanceConfig) -> "LossStats":
        """Sum over the rows of a micro-batch."""
        return cls(
            counts=torch.stack([choice_counts(stats, balance).sum(0) for stats in moe]),
            importance=_stacked([stats.importance for stats in moe]),
            load=_stacked([stats.load for stats in moe]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStats(_LayerSums):
    """Sums over the tokens of each row of a micro-batch, without gradient; without the leading L for a single layer."""

    counts: Tensor
    """(L, B, E) as in `LossStats`."""
    tokens: Tensor
    """(L, B) counted tokens."""
    importance: Tensor | None = None
    """(L, B, E)."""
    load: Tensor | None = None
    """(L, B, E)."""

    @classmethod
    def of(cls, moe: Sequence[MoEStats], balance: BalanceConfig) -> "RowStats":
        """Collect what is here of the rows."""
        return cls(
            counts=torch.stack([choice_counts(stats, balance) for stats in moe]),
            tokens=torch.stack([stats.tokens for stats in moe]),
            importance=_stacked_rows([stats.importance for stats in moe]),
            load=_stacked_rows([stats.load for stats in moe]),
        )


def choice_counts(stats: MoEStats, balance: BalanceConfig) -> Tensor:
    """Return the (B, E) counts that f is computed from under the convention; (B, E + 1) with null experts."""
    if balance.convention == "gshard_first_choice":
        return stats.first_choice_counts
    if stats.null_counts is None:
        return stats.counts
    return torch.cat([stats.counts, stats.null_counts[:, None]], dim=-1)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    rows = _stacked_rows(parts)
    return None if rows is None else rows.sum(1)


def _stacked_rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part.detach() for part in parts if part is not None]
    return torch.stack(present) if present else None
