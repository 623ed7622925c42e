"""Rows of a corpus that is read while it is learned, one block after another.

    visits    0 ............ 911 | 912 ....... 1807 | ...     each block has rows of its own, in an order of its own;
    block     0                  | 1                |         no row is of two blocks, and no block of two epochs

Which block a visit is of hangs on the sizes of all blocks before it. A run that goes on knows where its block begins,
and reads nothing of those.

# n rows.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config.base import Config
from trainer.data.batches.row_order import DomainRows, SequenceRows
from trainer.data.permutation import FOR_BLOCK_ROWS, hash64
from trainer.data.token_cache.block_stream import BlockInfo, BlockStream, Mark
from trainer.data.token_cache.shards import TokenFile
from trainer.errors import DataError

_OPEN_BLOCKS = 2
_DOCUMENTS_OF_A_BLOCK = 1 << 40


class StreamPosition(Config):
    """Position of a block, in the stream and in the run."""

    block: int = 0
    first_visit: int = 0
    mark: Mark = Mark()


class _Known(NamedTuple):
    place: StreamPosition
    num_rows: int


class StreamedRows(DomainRows):
    """The rows of a streamed domain. Visits before a place that it was told to go on from cannot be read."""

    def __init__(
        self, stream: BlockStream, *, min_tokens: int, seed: int, rows_of: Callable[[TokenFile, int], DomainRows]
    ) -> None:
        """Start at the beginning.

        Args:
            stream: its blocks.
            min_tokens: of a row; what an epoch leaves may be less.
            seed: the order in a block is a function of it.
            rows_of: makes the rows of a block's text, from it and a seed of the block's own.
        """
        self._stream, self._min_tokens, self._seed, self._rows_of = stream, min_tokens, seed, rows_of
        self._known: list[_Known] = []
        self._next = StreamPosition()
        self._open: dict[int, DomainRows] = {}

    @property
    def num_rows(self) -> None:
        """Not known."""
        return None

    def go_on_from(self, place: StreamPosition) -> None:
        """Take a place from who was there; nothing was read before."""
        self._known, self._next = [], place
        self._stream.go_on_from(place.block, place.mark)

    def place(self, num_visits: int) -> StreamPosition:
        """Return where the block of the last of the first visits begins, which has been read."""
        return self._block_of(num_visits - 1).place if num_visits else StreamPosition()

    def epochs(self, num_visits: int) -> float:
        """Return how often the stream was read to its end before the last of its first visits."""
        return float(self.place(num_visits).mark.epoch)

    def blocks(self) -> list[tuple[int, BlockInfo]]:
        """Return the blocks whose place in the run is known, by number."""
        return [(known.place.block, self._stream.info(known.place.block)) for known in self._known]

    def is_known(self, visit: int) -> bool:
        """Tell whether a visit can be read without waiting for a block."""
        return bool(self._known) and visit < self._next.first_visit

    def read_on(self, visit: int, *, ahead: bool) -> None:
        """Make the blocks up to that of a visit, and begin with the next one behind if `ahead`.

        Raises:
            DataError: if the text is unusable.
        """
        known = self._block_of(visit)
        self._rows(known.place.block)
        if ahead:
            self._stream.read_ahead(known.place.block + 1)

    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the rows of visits (n,)."""
        parts: list[tuple[NDArray[np.int64], SequenceRows]] = []
        if len(visits):
            self._block_of(int(visits.max()))
        for known in self._known:
            first = known.place.first_visit
            here = np.flatnonzero((visits >= first) & (visits < first + known.num_rows))
            if len(here):
                rows = self._rows(known.place.block).read(visits[here] - first)
                parts.append((here, rows))
                rows.document[...] += known.place.block * _DOCUMENTS_OF_A_BLOCK
        order = np.concatenate([here for here, _ in parts])
        if len(order) < len(visits):
            raise ValueError(f"visits before {self._known[0].place.first_visit}, where the run went on, are gone")
        back = np.argsort(order)
        return SequenceRows(
            **{f.name: np.concatenate([getattr(rows, f.name) for _, rows in parts])[back] for f in fields(SequenceRows)}
        )

    def _block_of(self, visit: int) -> _Known:
        while not self.is_known(visit):
            place, epoch = self._next, self._next.mark.epoch
            if self._known and epoch > self._known[0].place.mark.epoch and all(k.num_rows == 0 for k in self._known):
                raise DataError(
                    f"data.sources: {self._stream.name}: a row needs {self._min_tokens} tokens, and no block of the "
                    "stream has them; give it more text, or use a smaller model.seq_len"
                )
            num_rows = self._num_rows(place.block)
            self._known.append(_Known(place, num_rows))
            end = self._stream.info(place.block).end
            self._next = StreamPosition(block=place.block + 1, first_visit=place.first_visit + num_rows, mark=end)
        if visit < self._known[0].place.first_visit:
            raise DataError(
                f"data.sources: {self._stream.name}: the run went on from row {self._known[0].place.first_visit} of "
                f"this stream, and is asked for row {visit}; its share of the mixture cannot shrink in a run that goes "
                "on; restore weights and mixture, or start a new run"
            )
        return next(known for known in reversed(self._known) if known.place.first_visit <= visit and known.num_rows)

    def _num_rows(self, block: int) -> int:
        if self._stream.info(block).train.num_tokens < self._min_tokens:
            return 0
        num_rows = self._rows(block).num_rows
        assert num_rows is not None, "a block is not a stream"
        return num_rows

    def _rows(self, block: int) -> DomainRows:
        if block not in self._open:
            seed = int(hash64(self._seed, FOR_BLOCK_ROWS, block)[0])
            self._open[block] = self._rows_of(self._stream.block(block).train, seed)
            while len(self._open) > _OPEN_BLOCKS:
                del self._open[next(iter(self._open))]
        return self._open[block]
