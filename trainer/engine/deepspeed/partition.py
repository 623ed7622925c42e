"""ZeRO's partitions, equal parts of concatenated weights, and their conversion to the whole rows of a checkpoint.

#  parameters    | a a a a | b b b b b b b b b b | c c | padding       each letter is an element, b has rows of 5
#  partitions    | rank 0        | rank 1        | rank 2          |
#  rows of rank  | 0 0 0 0 | 0 0 0 0 0 1 1 1 1 1 | 2 2 |

A row belongs to the rank in whose partition it begins. The elements before the first row that begins in a partition are
the end of an earlier rank's row, and are sent to that rank when the state is saved. A rank that loads a state reads
that row too.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from trainer.distributed.collectives import Group


@dataclass(frozen=True, slots=True)
class ParameterSpan:
    """Range of a parameter among the elements of its group."""

    name: str
    shape: tuple[int, ...]
    """At least one dimension; dimension 0 is the rows."""
    offset: int

    @property
    def row(self) -> int:
        """Elements per row."""
        return prod(self.shape[1:])

    @property
    def end(self) -> int:
        """Offset of its end."""
        return self.offset + prod(self.shape)

    def first_row_from(self, position: int) -> int:
        """Return the first row that begins at or after `position`."""
        return min(self.shape[0], max(0, -(-(position - self.offset) // self.row)))


class Partition:
    """This rank's equal part of a group of parameters."""

    def __init__(self, parameters: Sequence[ParameterSpan], size: int, group: Group) -> None:
        """Compute which elements move between ranks.

        Parameters are in order of their offsets, possibly with padding between them; `size` includes padding.
        """
        self.parameters, self.size, self.group = list(parameters), size, group
        # Where each rank's own rows begin; elements before that belong to an earlier rank.
        cuts = [self._first_begin(rank * size) for rank in range(group.size)]
        heads = [min(cut - rank * size, size) for rank, cut in enumerate(cuts)]
        owners = [max((q for q in range(rank) if cuts[q] <= rank * size), default=rank) for rank in range(group.size)]
        me = group.index
        self.begin, self._head = me * size, heads[me]
        self._send = [heads[me] if rank == owners[me] and rank != me else 0 for rank in range(group.size)]
        self._receive = [heads[q] if owners[q] == me and q != me else 0 for q in range(group.size)]

    def fragments(self, flat: Tensor) -> dict[str, Tensor]:
        """Return this rank's part of each parameter, by name, as views of `flat` (size,)."""
        found = {}
        for span in self.parameters:
            start, stop = (span.offset + position - self.begin for position in self._overlap(span))
            if start < stop:
                found[span.name] = flat[start:stop]
        return found

    def pieces_of(self, names: Set[str], pieces: Iterable[Tensor]) -> dict[str, list[Tensor]]:
        """Return views of this rank's part of some parameters, by name, given the part in consecutive pieces."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        wanted, at = [span for span in self.parameters if span.name in names], 0
        for piece in pieces:
            for span in wanted:
                start, stop = (span.offset + position - self.begin - at for position in self._overlap(span))
                if max(0, start) < min(stop, piece.numel()):
                    found[span.name].append(piece.reshape(-1)[max(0, start) : stop])
            at += piece.numel()
        return {name: parts for name, parts in found.items() if parts}

    def rows(self, flat: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Return this rank's rows of every parameter and the index of the first. Collective over the group.

        Rows share memory with `flat` (size,), this rank's part, unless the last of them continues on another rank.
        """
        tail = flat[: self._head]
        if self.group.size > 1:  # via the group's device, if `flat` is elsewhere
            tail = self.group.all_to_all(tail.to(self.group.device), self._send, self._receive).to(flat.device)
        found = {}
        for span in self.parameters:
            first, last = self._rows_of(span)
            start, stop = (span.offset + r * span.row - self.begin for r in (first, last))
            if first == last:
                part = flat[:0]
            elif stop <= self.size:
                part = flat[start:stop]
            else:
                part = torch.cat([flat[start:], tail[: stop - self.size]])
            found[span.name] = first, part.view(last - first, *span.shape[1:])
        return found

    def wanted(self) -> dict[str, tuple[int, int]]:
        """Return the first and last + 1 row of every parameter of which this rank's part has elements."""
        found = {}
        for span in self.parameters:
            start, stop = self._overlap(span)
            first = start // span.row
            found[span.name] = (first, max(first, -(-stop // span.row)))
        return found

    def fill(self, flat: Tensor, name: str, rows: Tensor) -> None:
        """Overwrite this rank's part of a parameter in `flat` (size,), given the rows named by `wanted`."""
        span = next(span for span in self.parameters if span.name == name)
        start, stop = self._overlap(span)
        if start < stop:
            inside = start % span.row
            target = span.offset + start - self.begin
            flat[target : target + stop - start] = rows.reshape(-1)[inside : inside + stop - start].to(flat)

    def _first_begin(self, position: int) -> int:
        """Return the offset of the first row that begins at or after `position`; the end if there is none."""
        for span in self.parameters:
            row = span.first_row_from(position)
            if row < span.shape[0]:
                return span.offset + row * span.row
        return max(position, self.parameters[-1].end)

    def _overlap(self, span: ParameterSpan) -> tuple[int, int]:
        """Return the first and last + 1 local element of a parameter, relative to it; equal if there is none."""
        start = min(max(self.begin - span.offset, 0), span.end - span.offset)
        return start, max(start, min(self.begin + self.size, span.end) - span.offset)

    def _rows_of(self, span: ParameterSpan) -> tuple[int, int]:
        """Return the first and last + 1 row that begins in this rank's part."""
        return span.first_row_from(self.begin), span.first_row_from(self.begin + self.size)
