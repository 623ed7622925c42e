"""Rows of which each rank of a group has a part, seen whole: what decides about a row needs all of its tokens."""

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.distributed.collectives import Group
from trainer.ops.zigzag import in_row_order, part_of


class SharedRows:
    """Exchange of what is known of each token, between the ranks that share rows."""

    def __init__(self, group: Group, attending: Group | None = None) -> None:
        """Create it for the ranks that share rows; `attending` are those of them that hold the same heads.

        None: all of them do. Then attention sees what is here, and the others' by itself.
        """
        self._group, self._attending = group, group if attending is None else attending

    @torch.no_grad()
    def whole(self, x: Tensor) -> Tensor:
        """Return (B, S of the row, ...) in the order of the row, from this rank's (B, S, ...). Collective."""
        is_bool = x.dtype is torch.bool
        parts = self._group.all_gather(x.to(torch.uint8) if is_bool else x.contiguous())
        return in_row_order(parts.bool().unbind() if is_bool else parts.unbind())

    def whole_batch(self, batch: Batch) -> Batch:
        """Return a batch of whole rows from this rank's part of them. Collective."""
        parts = {name: part for name, part in batch.tensors().items() if name != "row_document_id"}
        return Batch(**{name: self.whole(part.to(self._group.device)) for name, part in parts.items()})

    def attended(self, positions: Tensor) -> Tensor:
        """Return the positions of the tokens whose heads are here, given those (S,) that are here."""
        columns = torch.arange(len(positions) * self._group.size, device=positions.device)
        return part_of(columns, self._attending.index, self._attending.size, dim=0)

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's (B, S, ...) of whole rows."""
        return part_of(whole, self._group.index, self._group.size)
