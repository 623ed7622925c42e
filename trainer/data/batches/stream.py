"""Rows of a training run by number, and their division into micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches.assemble import assemble, check_vocabulary, pad_rows, row_slice
from trainer.data.batches.batch import Batch
from trainer.data.batches.packed_rows import PackedRows
from trainer.data.batches.row_order import DomainRows
from trainer.data.batches.streamed_rows import StreamedRows, StreamPosition
from trainer.data.batches.text_order import TextOrder
from trainer.data.batches.wrapped_rows import WrappedRows
from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.data.mixture import Mixture
from trainer.data.sources.document_options import StreamOptions
from trainer.data.sources.registry import SourceConfig
from trainer.data.token_cache.skipped import SourceSkips
from trainer.data.token_cache.token_files import TokenFile
from trainer.distributed.rank_layout import even_slice


class TrainStream:
    """Rows of a training run by number. It has no position of its own: a run resumes from a slot number.

    Only a run whose text has changed on the way needs more: where the present text began, a `TextOrder`.
    """

    def __init__(
        self, corpus: Corpus, *, packing: Packing, seq_len: int, seed: int, instead: DomainRows | None = None
    ) -> None:
        """Raise DataError if a domain is too short for a row or its share too small to be drawn.

        `instead` are rows to train on instead of the corpus; who made them has checked their ids.
        """
        self._instead = instead
        if instead is not None:  # one domain, of which the rest is not read
            corpus = replace(
                corpus, domains=("sequences",), weights=(1.0,), contents=corpus.contents[:1], streams=(None,)
            )
        self._corpus, self._seq_len, self._packing, self._seed = corpus, seq_len, packing, seed
        self._order, self._first_visit = TextOrder(), np.zeros(len(corpus.domains), dtype=np.int64)
        self.mixture = Mixture(domains=corpus.domains, shares=corpus.weights, seed=seed)
        self.domain_rows = [self._domain_rows(domain, key=domain) for domain in range(len(corpus.domains))]

    def rows(self, first_slot: int, count: int) -> Batch:
        """Return rows first_slot .. first_slot + count - 1 as one batch of `count` rows; sample_id is the slot."""
        slots = np.arange(first_slot, first_slot + count, dtype=np.int64)
        domain, visit = self._locate(slots)
        parts = []
        for d in np.unique(domain).tolist():
            here = np.flatnonzero(domain == d)
            rows = self.domain_rows[d].read(visit[here])
            if self._instead is None:
                check_vocabulary(rows, self._corpus, "train", d)
            parts.append((here, rows))
        return assemble(parts, domain=domain, sample_id=slots, seq_len=self._seq_len)

    def needs_new_block(self, first_slot: int, count: int) -> bool:
        """Return whether rows first_slot .. first_slot + count - 1 need blocks of a stream not located yet.

        Ranks that have read the same rows so far get the same answer.
        """
        return any(not rows.is_located(visit) for rows, visit in self._last_visits(first_slot, count))

    def load_blocks(self, first_slot: int, count: int, *, prefetch: bool) -> None:
        """Build the stream blocks of those rows; `prefetch` also starts the next ones in the background."""
        for rows, visit in self._last_visits(first_slot, count):
            rows.load(visit, prefetch=prefetch)

    def stream_positions(self, num_slots: int) -> dict[str, Any]:
        """Return the position of each stream after the first `num_slots` rows of the run, as JSON values by domain."""
        visits = self._num_visits(num_slots)
        return {
            self._corpus.domains[domain]: rows.position(visits[domain]).model_dump()
            for domain, rows in enumerate(self.domain_rows)
            if isinstance(rows, StreamedRows)
        }

    @property
    def first_slot(self) -> int:
        """Number of the first row of this text; 0 unless the run has read another one before."""
        return self._order.start

    def text_order(self, num_slots: int) -> TextOrder:
        """Return the order of the text after the first `num_slots` rows of the run, for a checkpoint."""
        domains = {}
        for index, name in enumerate(self._corpus.domains):
            values = {"content": self._corpus.contents[index], "visits": self._num_visits(num_slots)[index]}
            domains[name] = self._order.of(name, index).model_copy(update=values)
        return TextOrder(start=self._order.start, domains=domains)

    def resume_at(self, positions: Mapping[str, Any], order: TextOrder | None = None) -> None:
        """Continue from the results of `stream_positions` and `text_order`, without reading the text before."""
        self._order = order or TextOrder()
        for index, name in enumerate(self._corpus.domains):
            domain = self._order.of(name, index)
            self._first_visit[index] = domain.first_visit
            if domain.key != index:
                self.domain_rows[index] = self._domain_rows(index, key=domain.key)
        for name, rows in zip(self._corpus.domains, self.domain_rows, strict=True):
            if isinstance(rows, StreamedRows) and name in positions:
                rows.resume_at(StreamPosition.model_validate(positions[name]))

    def skipped(self, sources: Sequence[SourceConfig]) -> list[SourceSkips]:
        """Return the records skipped so far: in ingested sources and in the blocks read."""
        streams = {s.domain: index for index, s in enumerate(sources) if isinstance(s, StreamOptions)}
        skipped = list(self._corpus.skipped)
        for name, rows in zip(self._corpus.domains, self.domain_rows, strict=True):
            if isinstance(rows, StreamedRows):
                skipped += [SourceSkips(streams[name], block, info.skipped) for block, info in rows.blocks()]
        return [one for one in skipped if one.records.count]

    def _last_visits(self, first_slot: int, count: int) -> list[tuple[StreamedRows, int]]:
        """Return the streams with any of those rows, each with its last visit."""
        if not any(isinstance(rows, StreamedRows) for rows in self.domain_rows):
            return []
        domain, visit = self._locate(np.arange(first_slot, first_slot + count, dtype=np.int64))
        return [
            (rows, int(visit[domain == index].max()))
            for index, rows in enumerate(self.domain_rows)
            if isinstance(rows, StreamedRows) and (domain == index).any()
        ]

    def epochs(self, num_slots: int) -> dict[str, float]:
        """Return the epochs of each domain in the first `num_slots` rows of the run."""
        visits = self._num_visits(num_slots)
        counted = zip(self._corpus.domains, self.domain_rows, visits, strict=True)
        return {name: rows.epochs(num_visits) for name, rows, num_visits in counted}

    def micro_batches(
        self, first_slot: int, *, global_batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[Batch]:
        """Return a rank's share of rows first_slot .. first_slot + global_batch_size - 1, split into equal batches.

        The step has the same rows for any number of ranks and any micro-batch size. Shares are consecutive rows and
        differ by at most one row. All ranks get the same number of batches, all of one size, which padding rows fill
        up. That size is the smallest for this number of batches, because padding costs as much as real rows.

            7 rows, 2 ranks, batches of 2     rank 0   0 1 | 2 -        rank 1   3 4 | 5 6
            7 rows, 2 ranks, batches of 9     rank 0   0 1 2 -          rank 1   3 4 5 6
        """
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {micro_batch_size}; it must be at least 1")
        start, end = even_slice(global_batch_size, world_size, rank)
        rows = self.rows(first_slot + start, end - start)
        largest = -(-global_batch_size // world_size)
        num_batches = -(-largest // micro_batch_size)
        size = -(-largest // num_batches)
        return [pad_rows(row_slice(rows, size * i, size * (i + 1)), size) for i in range(num_batches)]

    def _locate(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return domain and visit of each slot, both (n,)."""
        domain, visit = self.mixture.locate(slots - self._order.start)
        return domain, visit + self._first_visit[domain]

    def _num_visits(self, num_slots: int) -> list[int]:
        """Return the visits of each domain in the first slots of the run."""
        return (self.mixture.num_visits(num_slots - self._order.start) + self._first_visit).tolist()

    def _domain_rows(self, domain: int, *, key: int) -> DomainRows:
        """Return the rows of a domain; `key` is its number in the keys of its permutations."""
        if self._instead is not None:
            return self._instead
        corpus, packing, seq_len, seed = self._corpus, self._packing, self._seq_len, self._seed
        name, end_of_document = corpus.domains[domain], corpus.tokenizer.end_of_document

        def rows_of(file: TokenFile, seed: int) -> DomainRows:
            if packing == "wrapped":
                return WrappedRows(file, seq_len=seq_len, seed=seed, domain=key, name=name)
            return PackedRows(file, seq_len=seq_len, end_of_document=end_of_document, seed=seed, domain=key)

        stream = corpus.streams[domain]
        if stream is None:
            return rows_of(corpus.train[domain], seed)
        return StreamedRows(stream, min_tokens=seq_len + 1 if packing == "wrapped" else 1, seed=seed, rows_of=rows_of)
