"""Rows of concatenated documents, whose boundaries are ignored: `data.packing: wrapped`.

    tokens    t0 t1 t2 EOD t4 t5 t6 ...     S = 3
    row       t0 t1 t2                -> t1 t2 EOD
    the next            EOD t4 t5     -> t4 t5 t6

# n rows, S tokens in a row.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches.row_order import DomainRows, SequenceRows, epoch_order
from trainer.data.permutation import FOR_OFFSET, hash64
from trainer.data.token_cache.token_files import TokenFile
from trainer.errors import DataError


class WrappedRows(DomainRows):
    """Windows of S + 1 tokens (S inputs and their targets) at a stride of S.

    So no token is a target twice in an epoch. Each epoch has its own offset, so that window boundaries vary; in
    exchange, up to 2 S - 1 tokens at the ends of a domain are left out of an epoch.
    """

    def __init__(self, file: TokenFile, *, seq_len: int, seed: int, domain: int, name: str) -> None:
        """Raise DataError naming the domain, if its text is shorter than one window."""
        length = file.num_tokens
        if length < seq_len + 1:
            raise DataError(
                f"data.sources: domain {name} has {length} training tokens; one window of model.seq_len {seq_len} "
                f"needs {seq_len + 1}; give it more text, or use model.seq_len: {max(length - 1, 1)} or less, or "
                "data.packing: bfd"
            )
        self._file, self._seq_len = file, seq_len
        self._seed, self._domain = seed, domain
        # This many windows fit at every offset in [0, S). A text of less than two windows has one window and fewer
        # offsets. Either way, the number does not depend on the epoch.
        self.num_rows = max((length - seq_len) // seq_len, 1)
        self._num_offsets = min(length - self.num_rows * seq_len, seq_len)

    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the windows of visits (n,)."""
        return read_windows(self._file, self.starts(visits), self._seq_len)

    def starts(self, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position of the first token of each visit's window, (n,)."""
        epoch, window = epoch_order(visits, num_rows=self.num_rows, seed=self._seed, domain=self._domain)
        hashed = hash64(self._seed, FOR_OFFSET, self._domain, epoch.astype(np.uint64))
        return (hashed % np.uint64(self._num_offsets)).astype(np.int64) + window * self._seq_len


class Windows:
    """Windows of S tokens that cover a text from beginning to end, for evaluation.

    Every token but the first is a target exactly once.

        tokens    t0 t1 t2 t3 t4 t5 t6 t7 t8          S = 3
        window 0  t0 t1 t2           -> t1 t2 t3
        window 2                    t6 t7 --  -> t7 t8 --    -- is padding
    """

    def __init__(self, file: TokenFile, *, seq_len: int) -> None:
        self._file, self._seq_len = file, seq_len

    def read(self, index: NDArray[np.int64]) -> SequenceRows:
        """Return windows (n,) by number."""
        return read_windows(self._file, index * self._seq_len, self._seq_len)

    def with_targets(self) -> NDArray[np.int64]:
        """Return the numbers of the windows that have a target, ascending."""
        file, last = self._file, self._file.num_tokens - 1
        if last < 1:
            return np.zeros(0, dtype=np.int64)
        # A window from p has the targets p + 1 to p + S.
        begin, end = file.learned_spans()
        begin, end = np.maximum(begin, 1), np.minimum(end, last + 1)
        has_target = begin < end
        first, stop = (begin[has_target] - 1) // self._seq_len, (end[has_target] - 2) // self._seq_len + 1
        num_windows = -(-last // self._seq_len)
        begun, ended = (np.bincount(where, minlength=num_windows + 1) for where in (first, stop))
        return np.flatnonzero(np.cumsum(begun - ended)[:num_windows] > 0)


def read_windows(file: TokenFile, starts: NDArray[np.int64], seq_len: int) -> SequenceRows:
    """Return the windows of S + 1 tokens that begin at `starts` (n,), padded after the end of the text."""
    positions = starts[:, None] + np.arange(seq_len + 1)  # (n, S + 1)
    is_inside = positions < file.num_tokens
    positions = np.minimum(positions, file.num_tokens - 1)
    tokens, document = file.tokens[positions].astype(np.int64), file.document_of(positions)
    return SequenceRows(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=file.loss_mask(positions[:, 1:], document[:, 1:]),
        is_real=is_inside[:, 1:],
        document=document[:, :-1],
    )
