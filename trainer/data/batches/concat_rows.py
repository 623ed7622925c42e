"""Rows cut from the text without regard to documents: `data.packing: wrapped`.

    tokens    t0 t1 t2 EOD t4 t5 t6 ...     S = 3
    row       t0 t1 t2                -> t1 t2 EOD
    the next            EOD t4 t5     -> t4 t5 t6

# N tokens of a domain's text, n rows, S tokens in a row.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches.row_order import DomainRows, SequenceRows, epoch_order
from trainer.data.permutation import FOR_OFFSET, hash64
from trainer.data.token_cache.shards import TokenFile
from trainer.errors import DataError


class CrossingRows(DomainRows):
    """Windows of S + 1 tokens (S inputs, each with the token after it) at a stride of S.

    So no token is predicted twice in an epoch. An epoch starts at an offset of its own, so that windows are cut
    elsewhere every time. In exchange up to 2 S - 1 tokens at the ends of a domain are left out of an epoch.
    """

    def __init__(self, file: TokenFile, *, seq_len: int, seed: int, domain: int, name: str) -> None:
        """Start the rows of a domain.

        Args:
            file: its training text.
            seq_len: S.
            seed: the order is a function of it, and of `domain`.
            domain: index of the domain.
            name: of the domain, for messages.

        Raises:
            DataError: if the text is shorter than one window.
        """
        length = file.num_tokens
        if length < seq_len + 1:
            raise DataError(
                f"data.sources: domain {name} has {length} training tokens; one window of model.seq_len {seq_len} "
                f"needs {seq_len + 1}; give it more text, or use model.seq_len: {max(length - 1, 1)} or less, or "
                "data.packing: bfd"
            )
        self._file, self._seq_len = file, seq_len
        self._seed, self._domain = seed, domain
        # Every offset in [0, S) leaves room for this many windows. A text of less than two windows has one, and fewer
        # offsets. Either way the number does not depend on the epoch.
        self._num_rows = max((length - seq_len) // seq_len, 1)
        self._num_offsets = min(length - self._num_rows * seq_len, seq_len)

    @property
    def num_rows(self) -> int:
        """Windows of an epoch."""
        return self._num_rows

    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the windows of visits (n,)."""
        return read_windows(self._file, self.starts(visits), self._seq_len)

    def starts(self, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position of the first token of each visit's window (n,)."""
        epoch, window = epoch_order(visits, num_rows=self._num_rows, seed=self._seed, domain=self._domain)
        hashed = hash64(self._seed, FOR_OFFSET, self._domain, epoch.astype(np.uint64))
        return (hashed % np.uint64(self._num_offsets)).astype(np.int64) + window * self._seq_len


class Windows:
    """A text from its beginning to its end in windows of S: what is held out.

    Every token but the first is predicted exactly once, from those before it in its window.

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
        """Return the numbers of the windows in which anything is learned, ascending."""
        file, last = self._file, self._file.num_tokens - 1
        if last < 1:
            return np.zeros(0, dtype=np.int64)
        # The window of position p predicts positions p + 1 to p + S: of a document, from its answer to its end.
        ends = np.append(file.document_starts[1:] - 1, last)
        answers = np.maximum(file.answer_starts, 1)
        has_target = answers <= ends
        first, behind = (answers[has_target] - 1) // self._seq_len, (ends[has_target] - 1) // self._seq_len + 1
        num_windows = -(-last // self._seq_len)
        begun, ended = (np.bincount(where, minlength=num_windows + 1) for where in (first, behind))
        return np.flatnonzero(np.cumsum(begun - ended)[:num_windows] > 0)


def read_windows(file: TokenFile, starts: NDArray[np.int64], seq_len: int) -> SequenceRows:
    """Return the windows of S + 1 tokens from `starts` (n,) on; padding beyond the end of the text."""
    positions = starts[:, None] + np.arange(seq_len + 1)  # (n, S + 1)
    is_inside = positions < file.num_tokens
    positions = np.minimum(positions, file.num_tokens - 1)
    tokens, document = file.tokens[positions].astype(np.int64), file.document_of(positions)
    return SequenceRows(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        is_learned=file.is_learned(positions[:, 1:], document[:, 1:]),
        is_real=is_inside[:, 1:],
        document=document[:, :-1],
    )
