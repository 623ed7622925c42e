"""Rows of whole documents: `data.packing: bfd`.

A document of tokens t0 .. t2 takes one more position than it has tokens. The end of document (EOD) also marks its
beginning, so that each of its tokens, including the first one and the end, is a target exactly once in an epoch:

    inputs    EOD t0 t1 t2
    targets   t0  t1 t2 EOD

A document longer than a row is split into pieces of one row, each of which continues the previous one; only its last
piece shares a row. Pieces are packed by best-fit decreasing, and the rest of a row is padding:

    row    EOD a0 a1 a2 | EOD b0 | -- --     document   0 0 0 0 1 1 - -

The end is also a target after a document that the tail split has divided: each part is a document like any other.

# n rows, S positions in a row, P pieces in those rows.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches.best_fit import best_fit_decreasing
from trainer.data.batches.row_order import DomainRows, SequenceRows, epoch_order
from trainer.data.token_cache.token_files import TokenFile


class PackedDocuments:
    """All documents of a text, packed into rows numbered from 0. The same text gives the same rows."""

    def __init__(self, file: TokenFile, *, seq_len: int, end_of_document: int) -> None:
        self._file, self._seq_len, self._end_of_document = file, seq_len, end_of_document
        # A document begins at the end of document before its first token.
        begin = file.document_starts - 1
        needed = np.diff(begin, append=file.num_tokens)
        num_pieces = -(-needed // seq_len)
        document = np.repeat(np.arange(len(needed)), num_pieces)
        offset = _ranges(np.zeros_like(num_pieces), num_pieces) * seq_len  # of a piece in its document
        length = np.minimum(needed[document] - offset, seq_len)
        row = best_fit_decreasing(length, seq_len)
        by_row = np.argsort(row, kind="stable")
        self._document, self._length = document[by_row], length[by_row]
        self._first = begin[self._document] + offset[by_row]
        """Position of each piece's first input in the text; -1 for the first document, which no end precedes."""
        self._num_pieces = np.bincount(row)  # of each row
        self._row_starts = np.cumsum(self._num_pieces) - self._num_pieces
        self.num_rows = len(self._num_pieces)

    def read(self, index: NDArray[np.int64]) -> SequenceRows:
        """Return rows (n,) by number."""
        piece = _ranges(self._row_starts[index], self._num_pieces[index])  # (P,)
        length = self._length[piece]
        row = np.repeat(np.arange(len(index)), self._num_pieces[index])  # (P,)
        used = np.bincount(row, weights=length, minlength=len(index))
        is_real = np.arange(self._seq_len) < used[:, None]  # (n, S)
        position = _ranges(self._first[piece], length)  # of every real input, row by row
        document = np.repeat(self._document[piece], length)

        def to_rows(values: NDArray) -> NDArray:
            rows = np.zeros(is_real.shape, dtype=values.dtype)
            rows[is_real] = values
            return rows

        return SequenceRows(
            tokens=to_rows(self._tokens(position)),
            targets=to_rows(self._tokens(position + 1)),
            loss_mask=to_rows(self._file.loss_mask(position + 1, document)),
            is_real=is_real,
            document=to_rows(document),
        )

    def with_targets(self) -> NDArray[np.int64]:
        """Return the numbers of the rows that have a target, ascending."""
        # A piece has the targets first + 1 to first + length: does the stretch that ends after the first begin by then?
        begin, end = self._file.learned_spans()
        stretch = np.searchsorted(end, self._first + 1, side="right")
        begin = np.append(begin, self._file.num_tokens + 1)  # behind every target, for pieces after the last stretch
        has_target = begin[stretch] <= self._first + self._length
        return np.flatnonzero(np.logical_or.reduceat(has_target, self._row_starts))

    def _tokens(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens at positions of the text; ends of documents before and after it."""
        tokens, last = self._file.tokens, self._file.num_tokens - 1
        is_inside = (positions >= 0) & (positions <= last)
        return np.where(is_inside, tokens[np.clip(positions, 0, last)], self._end_of_document).astype(np.int64)


class PackedRows(DomainRows):
    """Packed documents in the order of a run; each epoch has every row once."""

    def __init__(self, file: TokenFile, *, seq_len: int, end_of_document: int, seed: int, domain: int) -> None:
        self._documents = PackedDocuments(file, seq_len=seq_len, end_of_document=end_of_document)
        self.num_rows = self._documents.num_rows
        self._seed, self._domain = seed, domain

    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the rows of visits (n,)."""
        _, index = epoch_order(visits, num_rows=self.num_rows, seed=self._seed, domain=self._domain)
        return self._documents.read(index)


def _ranges(first: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return first[0], first[0] + 1, ... (length[0] numbers), then first[1], first[1] + 1, ..."""
    before = np.cumsum(length) - length
    return np.repeat(first - before, length) + np.arange(length.sum())
