"""ZeRO's partitions: weights laid end to end, cut into equal parts; and the whole rows that a checkpoint is made of.

#  parameters    | a a a a | b b b b b b b b b b | c c | padding       each letter is an element, b has rows of 5
#  partitions    | rank 0        | rank 1        | rank 2          |
#  rows of rank  | 0 0 0 0 | 0 0 0 0 0 1 1 1 1 1 | 2 2 |

A row belongs to the rank in whose partition it begins. What lies before the first row that begins in a partition is the
end of an earlier rank's row, and is sent to it when a state is asked for. A rank that loads a state reads that row too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from trainer.distributed.collectives import Group


@dataclass(frozen=True, slots=True)
class Placed:
    """Range of a parameter among the elements of its group."""

    name: str
    shape: tuple[int, ...]
    """At least one dimension; index 0 counts rows."""
    offset: int

    @property
    def row(self) -> int:
        """Elements in a row."""
        return prod(self.shape[1:])

    @property
    def end(self) -> int:
        """Offset of what comes behind it."""
        return self.offset + prod(self.shape)

    def first_row_from(self, position: int) -> int:
        """Return the first row that begins at `position` or behind it."""
        return min(self.shape[0], max(0, -(-(position - self.offset) // self.row)))


@dataclass(frozen=True, slots=True)
class PartitionRows:
    """Whole rows of one parameter."""

    start: int
    tensor: Tensor
    """(rows, *shape[1:]); may be empty."""


class Partition:
    """This rank's equal part of a group of parameters."""

    def __init__(self, parameters: Sequence[Placed], size: int, group: Group) -> None:
        """Describe it.

        Args:
            parameters: in the order in which they lie end to end; there may be padding between them.
            size: elements in each rank's part, padding included.
            group: the ranks that share the parameters.
        """
        self.parameters, self.size, self.group = list(parameters), size, group
        # Where each rank's own rows begin; what it has before that belongs to an earlier rank.
        cuts = [self._first_begin(rank * size) for rank in range(group.size)]
        heads = [min(cut - rank * size, size) for rank, cut in enumerate(cuts)]
        owners = [max((q for q in range(rank) if cuts[q] <= rank * size), default=rank) for rank in range(group.size)]
        me = group.index
        self.begin, self._head = me * size, heads[me]
        self._send = [heads[me] if rank == owners[me] and rank != me else 0 for rank in range(group.size)]
        self._receive = [heads[q] if owners[q] == me and q != me else 0 for q in range(group.size)]

    def fragments(self, flat: Tensor) -> dict[str, Tensor]:
        """Return what of each parameter lies in this rank's part, by name: views of `flat`, (size,)."""
        found = {}
        for placed in self.parameters:
            start, stop = (placed.offset + position - self.begin for position in self._overlap(placed))
            if start < stop:
                found[placed.name] = flat[start:stop]
        return found

    def rows(self, flat: Tensor) -> dict[str, PartitionRows]:
        """Return this rank's rows of every parameter; every rank of the group must call it.

        Args:
            flat: (size,) this rank's part.

        Returns:
            By name. Rows that are whole in `flat` share its memory, unless the last one of theirs goes on elsewhere.
        """
        tail = self._exchange(flat[: self._head], self._send, self._receive)
        found = {}
        for placed in self.parameters:
            first, last = self._rows_of(placed)
            start, stop = (placed.offset + r * placed.row - self.begin for r in (first, last))
            if first == last:
                part = flat[:0]
            elif stop <= self.size:
                part = flat[start:stop]
            else:
                part = torch.cat([flat[start:], tail[: stop - self.size]])
            found[placed.name] = PartitionRows(first, part.view(last - first, *placed.shape[1:]))
        return found

    def wanted(self) -> dict[str, tuple[int, int]]:
        """Return the first and last + 1 of the rows of every parameter that this rank's part has elements of."""
        found = {}
        for placed in self.parameters:
            start, stop = self._overlap(placed)
            first = start // placed.row
            found[placed.name] = (first, max(first, -(-stop // placed.row)))
        return found

    def fill(self, flat: Tensor, name: str, rows: Tensor) -> None:
        """Overwrite what of a parameter lies in this rank's part.

        Args:
            flat: (size,) this rank's part.
            name: of the parameter.
            rows: those that `wanted` names.
        """
        placed = next(placed for placed in self.parameters if placed.name == name)
        start, stop = self._overlap(placed)
        if start < stop:
            inside = start % placed.row
            target = placed.offset + start - self.begin
            flat[target : target + stop - start] = rows.reshape(-1)[inside : inside + stop - start].to(flat)

    def _first_begin(self, position: int) -> int:
        """Return where the first row begins that does so at `position` or behind it; the end if none does."""
        for placed in self.parameters:
            row = placed.first_row_from(position)
            if row < placed.shape[0]:
                return placed.offset + row * placed.row
        return max(position, self.parameters[-1].end)

    def _overlap(self, placed: Placed) -> tuple[int, int]:
        """Return the first and last + 1 of a parameter's own elements that lie here; equal if none do."""
        start = min(max(self.begin - placed.offset, 0), placed.end - placed.offset)
        return start, max(start, min(self.begin + self.size, placed.end) - placed.offset)

    def _rows_of(self, placed: Placed) -> tuple[int, int]:
        """Return the first and last + 1 of the rows that begin in this rank's part."""
        return placed.first_row_from(self.begin), placed.first_row_from(self.begin + self.size)

    def _exchange(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Move elements between the ranks; to where messages are sent from, and back, where `x` is not there."""
        if self.group.size == 1:
            return x
        return self.group.all_to_all(x.to(self.group.device), send, receive).to(x.device)
