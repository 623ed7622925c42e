"""A cut of a tensor: some ranges of one of its dimensions, in place of the whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """Ranges of one dimension of a tensor; those of all ranks that hold a tensor together cover it once.

    # queries, keys and values of heads 2 and 3 of four:  dim 0    q . . q q | k . . k k | v . . v v
    """

    dim: int
    size: int
    """Size of the whole tensor along this dimension."""
    ranges: tuple[tuple[int, int], ...]
    """First and last + 1 of each range, in order."""

    @property
    def width(self) -> int:
        """Size of the cut along its dimension."""
        return sum(last - first for first, last in self.ranges)

    @property
    def numbers(self) -> list[int]:
        """Index in the whole tensor of each index of the cut along its dimension."""
        return [index for first, last in self.ranges for index in range(first, last)]

    def of(self, whole: Tensor) -> Tensor:
        """Return the cut of a whole tensor, as a copy."""
        return torch.cat([whole.narrow(self.dim, first, last - first) for first, last in self.ranges], self.dim)

    def pieces(self, part: Sequence[slice]) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Yield the consecutive pieces of a part of the cut: where along its dimension, and where in the whole tensor.

        Of several ranges of columns no piece would be consecutive in memory.
        """
        assert self.dim == 0 or len(self.ranges) == 1
        mine, at = part[self.dim], 0  # `at` is where a range begins in the cut
        for first, last in self.ranges:
            begin, end = max(mine.start, at), min(mine.stop, at + last - first)
            if begin < end:
                whole = slice(first + begin - at, first + end - at)
                yield (
                    slice(begin - mine.start, end - mine.start),
                    (*part[: self.dim], whole, *part[self.dim + 1 :]),
                )
            at += last - first

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the whole tensor, given that of the cut."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])
