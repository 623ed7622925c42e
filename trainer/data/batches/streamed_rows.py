"""Rows of a streamed domain, block by block.

    visits    0 ............ 911 | 912 ....... 1807 | ...     each block has its own rows in its own order;
    block     0                  | 1                |         no row spans two blocks, and no block two epochs

The block of a visit depends on the sizes of all blocks before it. A resumed run knows where its block begins and reads
none of those.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config.base import Config
from trainer.data.batches.row_order import DomainRows, SequenceRows
from trainer.data.permutation import FOR_BLOCK_ROWS, hash64
from trainer.data.token_cache.block_stream import BlockStream
from trainer.data.token_cache.stream_block import BlockInfo, Mark
from trainer.data.token_cache.token_files import TokenFile
from trainer.errors import DataError

_MAX_OPEN_BLOCKS = 2
_MAX_BLOCK_DOCUMENTS = 1 << 40  # bound on the documents of a block, which makes document numbers unique across blocks


class StreamPosition(Config):
    """Start of a block: its number, its first visit, and its position in the stream. Part of checkpoints."""

    block: int = 0
    first_visit: int = 0
    mark: Mark = Mark()


class _LocatedBlock(NamedTuple):
    start: StreamPosition
    num_rows: int


class StreamedRows(DomainRows):
    """Rows of a streamed domain. Visits before the position that the run resumed at cannot be read."""

    num_rows = 0

    def __init__(
        self, stream: BlockStream, *, min_tokens: int, seed: int, rows_of: Callable[[TokenFile, int], DomainRows]
    ) -> None:
        """Start at the beginning of the stream; `rows_of` creates the rows of a block from its text and a seed.

        A row needs `min_tokens`; the last block of an epoch may have fewer and is then left out.
        """
        self._stream, self._min_tokens, self._seed, self._rows_of = stream, min_tokens, seed, rows_of
        self._located: list[_LocatedBlock] = []
        self._next = StreamPosition()
        self._open: dict[int, DomainRows] = {}

    def resume_at(self, position: StreamPosition) -> None:
        """Continue from a block; call it before reading."""
        self._located, self._next = [], position
        self._stream.resume_at(position.block, position.mark)

    def position(self, num_visits: int) -> StreamPosition:
        """Return the start of the block of the last of `num_visits` visits, which must have been read."""
        return self._block_of(num_visits - 1).start if num_visits else StreamPosition()

    def epochs(self, num_visits: int) -> float:
        """Return the complete epochs before the last of the first `num_visits` visits."""
        return float(self.position(num_visits).mark.epoch)

    def blocks(self) -> list[tuple[int, BlockInfo]]:
        """Return number and entry of the blocks located so far."""
        return [(block.start.block, self._stream.info(block.start.block)) for block in self._located]

    def is_located(self, visit: int) -> bool:
        """Return whether the block of a visit is known, so that reading need not wait for it."""
        return bool(self._located) and visit < self._next.first_visit

    def load(self, visit: int, *, prefetch: bool) -> None:
        """Build the blocks up to that of a visit; `prefetch` also starts the next one in the background."""
        block = self._block_of(visit).start.block
        self._rows(block)
        if prefetch:
            self._stream.prefetch(block + 1)

    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the rows of visits (n,)."""
        parts: list[tuple[NDArray[np.int64], SequenceRows]] = []
        if len(visits):
            self._block_of(int(visits.max()))
        for block in self._located:
            first = block.start.first_visit
            here = np.flatnonzero((visits >= first) & (visits < first + block.num_rows))
            if len(here):
                rows = self._rows(block.start.block).read(visits[here] - first)
                parts.append((here, rows))
                rows.document[...] += block.start.block * _MAX_BLOCK_DOCUMENTS
        order = np.concatenate([here for here, _ in parts])
        if len(order) < len(visits):
            raise ValueError(f"visits before {self._located[0].start.first_visit}, where the run resumed, are gone")
        inverse = np.argsort(order)
        names = [field.name for field in fields(SequenceRows) if field.name != "experts"]  # a text has none
        joined = {name: np.concatenate([getattr(rows, name) for _, rows in parts])[inverse] for name in names}
        return SequenceRows(**joined)

    def _block_of(self, visit: int) -> _LocatedBlock:
        while not self.is_located(visit):
            start, epoch = self._next, self._next.mark.epoch
            is_next_epoch = bool(self._located) and epoch > self._located[0].start.mark.epoch
            if is_next_epoch and not any(block.num_rows for block in self._located):  # and there will never be one
                raise DataError(
                    f"data.sources: {self._stream.name}: a row needs {self._min_tokens} tokens, and no block of the "
                    "stream has them; give it more text, or use a smaller model.seq_len"
                )
            num_rows = self._num_rows(start.block)
            self._located.append(_LocatedBlock(start, num_rows))
            end = self._stream.info(start.block).end
            self._next = StreamPosition(block=start.block + 1, first_visit=start.first_visit + num_rows, mark=end)
        first_visit = self._located[0].start.first_visit
        if visit < first_visit:
            raise DataError(
                f"data.sources: {self._stream.name}: the run resumed at row {first_visit} of this stream but now "
                f"needs row {visit}; the stream's share of the mixture must not shrink in a resumed run; restore "
                "weights and mixture, or start a new run"
            )
        return next(b for b in reversed(self._located) if b.start.first_visit <= visit and b.num_rows)

    def _num_rows(self, block: int) -> int:
        is_too_short = self._stream.info(block).train.num_tokens < self._min_tokens
        return 0 if is_too_short else self._rows(block).num_rows

    def _rows(self, block: int) -> DomainRows:
        if block not in self._open:
            seed = int(hash64(self._seed, FOR_BLOCK_ROWS, block)[0])
            self._open[block] = self._rows_of(self._stream.block(block).train, seed)
            while len(self._open) > _MAX_OPEN_BLOCKS:
                del self._open[next(iter(self._open))]
        return self._open[block]
