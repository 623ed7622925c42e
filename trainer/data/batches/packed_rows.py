"""Rows of whole documents: `data.packing: bfd`.

A document of tokens t0 .. t2 takes one position more than it has tokens. The end of document (EOD) stands for its
beginning too, so that every token of it is predicted exactly once in an epoch, the first one and its end included:

    inputs    EOD t0 t1 t2
    targets   t0  t1 t2 EOD

A document that is longer than a row is cut in pieces of a row, each of which goes on where the last one ended; only its
last piece shares a row with others. Pieces are packed by best-fit decreasing, and what is left of a row is padding:

    row    EOD a0 a1 a2 | EOD b0 | -- --     document   0 0 0 0 1 1 - -

The end is predicted behind what a tail split cut, too: that piece is a document like any other.

# n rows, S positions in a row, P pieces in those rows.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches.best_fit import best_fit_decreasing
from trainer.data.batches.row_order import DomainRows, SequenceRows, epoch_order
from trainer.data.token_cache.shards import TokenFile


class PackedDocuments:
    """All documents of a text, packed into rows that are numbered from 0. The same text gives the same rows."""

    def __init__(self, file: TokenFile, *, seq_len: int, end_of_document: int) -> None:
        """Pack the documents of `file` into rows of `seq_len` positions."""
        self._file, self._seq_len, self._end_of_document = file, seq_len, end_of_document
        # The end of the document before stands in front of a document's first token: it is where the document begins.
        begin = file.document_starts - 1
        needed = np.diff(begin, append=file.num_tokens)
        num_pieces = -(-needed // seq_len)
        document = np.repeat(np.arange(len(needed)), num_pieces)
        cut_at = _ranges(np.zeros_like(num_pieces), num_pieces) * seq_len  # where a piece begins in its document
        length = np.minimum(needed[document] - cut_at, seq_len)
        row = best_fit_decreasing(length, seq_len)
        by_row = np.argsort(row, kind="stable")
        self._document, self._length = document[by_row], length[by_row]
        self._first = begin[self._document] + cut_at[by_row]
        """Position of each piece's first input in the text; -1 for the first document, which no end stands before."""
        self._in_row = np.bincount(row)  # pieces in each row
        self._row_starts = np.cumsum(self._in_row) - self._in_row
        self.num_rows = len(self._in_row)

    def read(self, index: NDArray[np.int64]) -> SequenceRows:
        """Return rows (n,) by number."""
        piece = _ranges(self._row_starts[index], self._in_row[index])  # (P,)
        length = self._length[piece]
        row = np.repeat(np.arange(len(index)), self._in_row[index])  # (P,)
        used = np.bincount(row, weights=length, minlength=len(index))
        is_real = np.arange(self._seq_len) < used[:, None]  # (n, S)
        position = _ranges(self._first[piece], length)  # of every real input, row after row
        document = np.repeat(self._document[piece], length)

        def in_rows(values: NDArray) -> NDArray:
            rows = np.zeros(is_real.shape, dtype=values.dtype)
            rows[is_real] = values
            return rows

        return SequenceRows(
            tokens=in_rows(self._tokens(position)),
            targets=in_rows(self._tokens(position + 1)),
            is_learned=in_rows(self._file.is_learned(position + 1, document)),
            is_real=is_real,
            document=in_rows(document),
        )

    def with_targets(self) -> NDArray[np.int64]:
        """Return the numbers of the rows in which anything is learned, ascending."""
        is_learned = self._file.is_learned(self._first + self._length, self._document)  # the last target of each piece
        return np.flatnonzero(np.logical_or.reduceat(is_learned, self._row_starts))

    def _tokens(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens at positions of the text, before and behind which there are ends of documents."""
        tokens, last = self._file.tokens, self._file.num_tokens - 1
        is_inside = (positions >= 0) & (positions <= last)
        return np.where(is_inside, tokens[np.clip(positions, 0, last)], self._end_of_document).astype(np.int64)


class WholeRows(DomainRows):
    """Packed documents in the order of a run: each epoch has every row once."""

    def __init__(self, file: TokenFile, *, seq_len: int, end_of_document: int, seed: int, domain: int) -> None:
        """Start the rows of a domain, whose order is a function of `seed` and the index `domain`."""
        self._documents = PackedDocuments(file, seq_len=seq_len, end_of_document=end_of_document)
        self._seed, self._domain = seed, domain

    @property
    def num_rows(self) -> int:
        """Rows that all documents were packed into."""
        return self._documents.num_rows

    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the rows of visits (n,)."""
        _, index = epoch_order(visits, num_rows=self.num_rows, seed=self._seed, domain=self._domain)
        return self._documents.read(index)


def _ranges(first: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return first[0], first[0] + 1, ... (length[0] numbers), then first[1], first[1] + 1, ..."""
    before = np.cumsum(length) - length
    return np.repeat(first - before, length) + np.arange(length.sum())
