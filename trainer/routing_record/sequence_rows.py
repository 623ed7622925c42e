"""Training rows of the sequences of a record: what an engine has written, packed by best-fit decreasing.

A sequence of tokens t0 .. t3 takes one position less than it has tokens; its last token is only a target, so it needs
no experts. Nothing is put before, between or after sequences, which do not see each other (`model.document_mask`):

    inputs    t0 t1 t2 | u0 u1 | --        experts of t0 t1 t2 and u0 u1
    targets   t1 t2 t3 | u1 u2 | --

# n rows, S positions in a row, L MoE layers, k experts per token.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.config.nodes import shown_path
from trainer.data.batches.best_fit import best_fit_decreasing
from trainer.data.batches.row_order import DomainRows, SequenceRows, epoch_order
from trainer.errors import DataError
from trainer.routing_record.record_reader import RoutingRecord


class RecordedSequences(DomainRows):
    """A record's sequences in the order of a run; each epoch has every row once, and each sequence is in one row."""

    def __init__(self, record: RoutingRecord, *, seq_len: int, seed: int) -> None:
        """Pack the sequences, leaving out those of one token; raise DataError if one does not fit into a row."""
        self._record, self._seq_len, self._seed = record, seq_len, seed
        needed = record.lengths() - 1
        if (too_long := np.flatnonzero(needed > seq_len)).size:
            number = int(too_long[0])
            raise DataError(
                f"{record.place(number)}: has {needed[number] + 1} tokens, and a row of model.seq_len {seq_len} holds "
                f"{seq_len + 1}; in parts it would be routed otherwise; use a larger model.seq_len"
            )
        used = np.flatnonzero(needed > 0)
        if not used.size:
            raise DataError(f"{shown_path(record.folder)}: no sequence has a second token to learn; record longer ones")
        row = best_fit_decreasing(needed[used], seq_len)
        self._sequences = used[np.argsort(row, kind="stable")]
        self._row_ends = np.cumsum(np.bincount(row))
        self.num_rows = len(self._row_ends)

    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the rows of visits (n,)."""
        _, index = epoch_order(visits, num_rows=self.num_rows, seed=self._seed, domain=0)
        shape, model = (len(index), self._seq_len), self._record.manifest.model
        tokens, targets, document = (np.zeros(shape, np.int64) for _ in range(3))
        loss_mask, is_real = np.zeros(shape, bool), np.zeros(shape, bool)
        experts = np.tile(np.arange(model.top_k), (*shape, len(model.moe_layers), 1))  # any, for padding
        for place, row in enumerate(index.tolist()):
            column = 0
            for number in self._sequences[self._row_ends[row - 1] if row else 0 : self._row_ends[row]].tolist():
                sequence = self._record.sequence(number)
                length = len(sequence.tokens) - 1
                here = (place, slice(column, column + length))
                tokens[here], targets[here] = sequence.tokens[:-1], sequence.tokens[1:]
                is_real[here], document[here] = True, number
                loss_mask[here] = True if sequence.is_learned is None else sequence.is_learned[1:]
                experts[here] = sequence.experts[:length]
                column += length
        return SequenceRows(
            tokens=tokens, targets=targets, loss_mask=loss_mask, is_real=is_real, document=document, experts=experts
        )
