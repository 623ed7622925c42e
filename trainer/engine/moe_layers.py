"""Sums of some MoE layers of a model, as sums of all of them.

# L MoE layers of the model, l of them here.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from trainer.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class MoELayers:
    """Some of a model's MoE layers: sums of them alone become sums of all, with zeros for the others.

    So the sum over all ranks of a pipeline, each of which has some layers, is that of a rank that has all.
    """

    numbers: tuple[int, ...]
    """Their numbers, counted among the MoE layers."""
    total: int
    """L."""

    @classmethod
    def of(cls, config: ModelConfig, blocks: Collection[int]) -> "MoELayers":
        """Return those of some of the model's blocks."""
        every = config.moe_layers
        return cls(tuple(i for i, block in enumerate(every) if block in blocks), len(every))

    def placed(self, sums: Tensor) -> Tensor:
        """Return (L, ...) of sums (l, ...) of these layers."""
        if len(self.numbers) == self.total:
            return sums
        placed = sums.new_zeros(self.total, *sums.shape[1:])
        placed[list(self.numbers)] = sums
        return placed

    def taken(self, sums: Tensor) -> Tensor:
        """Return the sums (l, ...) of these layers out of (L, ...)."""
        return sums if len(self.numbers) == self.total else sums[list(self.numbers)]
