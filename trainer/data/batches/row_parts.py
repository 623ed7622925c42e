"""A rank's part of the rows that it shares with other ranks."""

from trainer.data.batches.batch import Batch
from trainer.distributed.rank_layout import Layout
from trainer.ops.zigzag import part_of


def own_part(batch: Batch, layout: Layout) -> Batch:
    """Return this rank's columns of a batch of whole rows: all of them unless it shares its rows.

    Every field keeps what it says of a token: `position` is the column in the whole row.
    """
    if layout.row_size == 1:
        return batch
    parts = {name: part_of(tensor, layout.row_rank, layout.row_size) for name, tensor in batch.tensors().items()}
    return Batch(**parts, row_document_id=batch.document_id)
