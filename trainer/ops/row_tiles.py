"""Tiles of rows that are grouped by expert, for kernels whose programs each compute one tile.

# R rows, E experts, T tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTiles:
    """Tiles of the rows, none with rows of two experts."""

    map: Tensor
    """(3, T) int64: expert, first row, end of rows; an unused tile has no row."""
    size: int
    """Most rows of a tile."""

    @classmethod
    def of(cls, rows_per_expert: Tensor, num_rows: int, size: int) -> "RowTiles":
        """Divide groups of these sizes (E,), of R rows in all, into tiles; waits for nothing.

        #  rows_per_expert 3 0 2, size 2     expert 0 0 2 .     first 0 2 3 .     end 3 3 5 .
        """
        num_experts = len(rows_per_expert)
        ends = rows_per_expert.cumsum(0)
        tiles = (rows_per_expert + size - 1) // size
        end_tile = tiles.cumsum(0)
        tile = torch.arange(num_rows // size + num_experts, device=rows_per_expert.device)
        expert = torch.searchsorted(end_tile, tile, right=True)
        is_used = expert < num_experts
        expert = expert.clamp(max=num_experts - 1)
        index = tile - (end_tile - tiles)[expert]  # among the expert's tiles
        first = (ends - rows_per_expert)[expert] + index * size
        return cls(map=torch.stack([expert, first * is_used, ends[expert] * is_used]), size=size)

    def programs(self, width: int, columns: int) -> tuple[int]:
        """Return the grid for a result of this width."""
        return (self.map.shape[1] * -(-width // columns),)
