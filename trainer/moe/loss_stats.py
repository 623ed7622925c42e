"""Statistics for losses over a global batch: sums over its tokens, for every layer.

# B sequences, E experts, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.moe.config import BalanceConfig
from trainer.moe.stats import MoEStats


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStats:
    """Sums over some tokens, without gradient."""

    counts: Tensor
    """(L, E) int64 assignments that the balance loss counts; (L, E + 1) with null experts."""
    importance: Tensor | None = None
    """(L, E) combine weights; None where no loss needs them, as for the next."""
    load: Tensor | None = None
    """(L, E) smooth counts."""

    @classmethod
    def of(cls, moe: Sequence[MoEStats], config: BalanceConfig) -> "LossStats":
        """Add up the rows of a micro-batch."""
        return cls(
            counts=torch.stack([choice_counts(stats, config).sum(0) for stats in moe]),
            importance=_stacked([stats.importance for stats in moe]),
            load=_stacked([stats.load for stats in moe]),
        )

    def layer(self, i: int) -> "LossStats":
        """Return the sums (E,) of one layer."""
        parts = (self.counts, self.importance, self.load)
        return self.like([None if part is None else part[i] for part in parts])

    def tensors(self) -> list[Tensor]:
        """Return the sums that there are, in a fixed order."""
        return [part for part in (self.counts, self.importance, self.load) if part is not None]

    def replaced(self, tensors: Sequence[Tensor]) -> "LossStats":
        """Return the same with other values, in the order of `tensors`."""
        values = iter(tensors)
        parts = (self.counts, self.importance, self.load)
        return self.like([None if part is None else next(values).to(part.dtype) for part in parts])

    def __add__(self, other: "LossStats") -> "LossStats":
        """Add up two disjoint sets of tokens."""
        return self.replaced([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])

    @classmethod
    def like(cls, parts: Sequence[Tensor | None]) -> "LossStats":
        """Make sums of counts, importance and load."""
        counts, importance, load = parts
        assert counts is not None
        return cls(counts=counts, importance=importance, load=load)


def choice_counts(stats: MoEStats, config: BalanceConfig) -> Tensor:
    """Return the (B, E) counts that f is made of under the convention; (B, E + 1) with null experts."""
    if config.convention == "gshard_first_choice":
        return stats.first_choice_counts
    if stats.null_counts is None:
        return stats.counts
    return torch.cat([stats.counts, stats.null_counts[:, None]], dim=-1)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part.detach().sum(0) for part in parts if part is not None]
    return torch.stack(there) if there else None
