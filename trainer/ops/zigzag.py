"""Balanced parts of rows: each of n parts has one chunk from the front of a row and the one as far from its end.

n 3, 6 chunks of a row    0 1 2 3 4 5
part 0                    0         5      under causal attention every part has as many visible keys
part 1                      1     4
part 2                        2 3
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def part_of(whole: Tensor, index: int, num_parts: int, *, dim: int = 1) -> Tensor:
    """Return part `index` of rows whose positions are dimension `dim`."""
    chunks = whole.chunk(2 * num_parts, dim)
    return torch.cat([chunks[index], chunks[-1 - index]], dim)


def in_row_order(parts: Sequence[Tensor], *, dim: int = 1) -> Tensor:
    """Return whole rows from all their parts."""
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([front for front, _ in halves] + [back for _, back in reversed(halves)], dim)
