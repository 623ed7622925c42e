"""Batches for training and evaluation, assembled from rows of the domains.

# B rows, S tokens in a row, n rows of one domain.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.data.batches.concat_rows import CrossingRows, Windows
from trainer.data.batches.packed_rows import PackedDocuments, WholeRows
from trainer.data.batches.row_order import DomainRows, SequenceRows
from trainer.data.batches.streamed_rows import StreamedRows, StreamPosition
from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.data.mixture import Mixture
from trainer.data.sources.registry import HfStreamSourceConfig, SourceConfig
from trainer.data.token_cache.skipped import SourceSkips
from trainer.data.token_cache.splits import Side
from trainer.data.token_cache.token_files import TokenFile
from trainer.distributed.rank_layout import even_slice
from trainer.errors import DataError

PADDING = -1
"""sample_id of padding rows, and document_id of all padding."""


class TrainStream:
    """Rows of a training run by number. It has no position of its own: a run resumes from a slot number."""

    def __init__(self, corpus: Corpus, *, packing: Packing, seq_len: int, seed: int) -> None:
        """Create the rows of all domains.

        Raises:
            DataError: if a domain is too short for a row or its share too small to be drawn.
        """
        self._corpus, self._seq_len = corpus, seq_len
        self.mixture = Mixture(domains=corpus.domains, shares=corpus.weights, seed=seed)
        self.domain_rows = [
            _domain_rows(corpus, domain, packing=packing, seq_len=seq_len, seed=seed)
            for domain in range(len(corpus.domains))
        ]

    def rows(self, first_slot: int, count: int) -> Batch:
        """Return rows first_slot .. first_slot + count - 1 as one batch of `count` rows; sample_id is the slot.

        Raises:
            DataError: if a token file holds an id outside the vocabulary.
        """
        slots = np.arange(first_slot, first_slot + count, dtype=np.int64)
        domain, visit = self.mixture.locate(slots)
        parts = []
        for d in np.unique(domain).tolist():
            here = np.flatnonzero(domain == d)
            rows = self.domain_rows[d].read(visit[here])
            _check_vocabulary(rows, self._corpus, "train", d)
            parts.append((here, rows))
        return _batch(parts, domain=domain, sample_id=slots, seq_len=self._seq_len)

    def needs_new_block(self, first_slot: int, count: int) -> bool:
        """Return whether rows first_slot .. first_slot + count - 1 need blocks of a stream not located yet.

        Ranks that have read the same rows so far get the same answer.
        """
        return any(not rows.is_located(visit) for rows, visit in self._last_visits(first_slot, count))

    def load_blocks(self, first_slot: int, count: int, *, prefetch: bool) -> None:
        """Build the stream blocks of those rows; `prefetch` also starts the next ones in the background.

        Raises:
            DataError: if their text is unusable.
        """
        for rows, visit in self._last_visits(first_slot, count):
            rows.load(visit, prefetch=prefetch)

    def stream_positions(self, num_slots: int) -> dict[str, Any]:
        """Return the position of each stream after the first `num_slots` rows of the run, as JSON values by domain."""
        visits = self.mixture.num_visits(num_slots).tolist()
        return {
            self._corpus.domains[domain]: rows.position(visits[domain]).model_dump()
            for domain, rows in enumerate(self.domain_rows)
            if isinstance(rows, StreamedRows)
        }

    def resume_at(self, positions: Mapping[str, Any]) -> None:
        """Continue from the result of `stream_positions`, without reading the text before."""
        for name, rows in zip(self._corpus.domains, self.domain_rows, strict=True):
            if isinstance(rows, StreamedRows) and name in positions:
                rows.resume_at(StreamPosition.model_validate(positions[name]))

    def skipped(self, sources: Sequence[SourceConfig]) -> list[SourceSkips]:
        """Return the records skipped so far: in ingested sources and in the blocks read.

        Args:
            sources: sources of the config.
        """
        streams = {s.domain: index for index, s in enumerate(sources) if isinstance(s, HfStreamSourceConfig)}
        skipped = list(self._corpus.skipped)
        for name, rows in zip(self._corpus.domains, self.domain_rows, strict=True):
            if isinstance(rows, StreamedRows):
                skipped += [SourceSkips(streams[name], block, info.skipped) for block, info in rows.blocks()]
        return [one for one in skipped if one.records.count]

    def _last_visits(self, first_slot: int, count: int) -> list[tuple[StreamedRows, int]]:
        """Return the streams with any of those rows, each with its last visit."""
        if not any(isinstance(rows, StreamedRows) for rows in self.domain_rows):
            return []
        domain, visit = self.mixture.locate(np.arange(first_slot, first_slot + count, dtype=np.int64))
        return [
            (rows, int(visit[domain == index].max()))
            for index, rows in enumerate(self.domain_rows)
            if isinstance(rows, StreamedRows) and (domain == index).any()
        ]

    def epochs(self, num_slots: int) -> dict[str, float | None]:
        """Return the epochs of each domain in the first `num_slots` rows of the run; None if unknown."""
        visits = self.mixture.num_visits(num_slots).tolist()
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


def pad_rows(batch: Batch, num_rows: int) -> Batch:
    """Append padding rows to a batch: not valid, token 0, domain 0, sample_id PADDING.

    Raises:
        ValueError: if the batch has more rows.
    """
    present, seq_len = batch.tokens.shape
    if present > num_rows:
        raise ValueError(f"{present} rows do not fit in {num_rows}")
    if present == num_rows:
        return batch
    padding = _batch(
        [],
        domain=np.zeros(num_rows - present, dtype=np.int64),
        sample_id=np.full(num_rows - present, PADDING, dtype=np.int64),
        seq_len=seq_len,
    )
    return Batch(**{f.name: torch.cat([getattr(batch, f.name), getattr(padding, f.name)]) for f in fields(Batch)})


def evaluation_batches(
    corpus: Corpus, domain_index: int, *, packing: Packing, seq_len: int, batch_size: int, max_tokens: int | None
) -> Iterator[Batch]:
    """Yield the validation text of a domain in batches of `batch_size` rows; sample_id is the number of the row.

    Args:
        corpus: the corpus.
        domain_index: index of the domain.
        packing: packing of its rows; see `Windows` and `PackedDocuments`.
        seq_len: S.
        batch_size: B; padding rows fill up the last batch.
        max_tokens: most positions, but at least one row; rows are evenly spaced among those with a target. None: the
            whole text.

    Raises:
        DataError: if there is no token to predict, or an id outside the vocabulary.
    """
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}; both must be at least 1")
    file = corpus.validation[domain_index]
    if packing == "bfd":
        text = PackedDocuments(file, seq_len=seq_len, end_of_document=corpus.tokenizer.end_of_document)
    else:
        text = Windows(file, seq_len=seq_len)
    numbers = text.with_targets()
    if not len(numbers):
        raise _nothing_to_predict(corpus, domain_index)
    numbers = _evenly_spaced(numbers, None if max_tokens is None else max(max_tokens // seq_len, 1))
    for first in range(0, len(numbers), batch_size):
        sample_id = numbers[first : first + batch_size]
        rows = text.read(sample_id)
        _check_vocabulary(rows, corpus, "validation", domain_index)
        batch = _batch(
            [(np.arange(len(sample_id)), rows)],
            domain=np.full_like(sample_id, domain_index),
            sample_id=sample_id,
            seq_len=seq_len,
        )
        yield pad_rows(batch, batch_size)


def row_slice(batch: Batch, first: int, end: int) -> Batch:
    """Return rows first .. end - 1 of a batch, or fewer if it ends before."""
    return Batch(**{f.name: getattr(batch, f.name)[first:end] for f in fields(Batch)})


def _domain_rows(corpus: Corpus, domain: int, *, packing: Packing, seq_len: int, seed: int) -> DomainRows:
    name, end_of_document = corpus.domains[domain], corpus.tokenizer.end_of_document

    def rows_of(file: TokenFile, seed: int) -> DomainRows:
        if packing == "wrapped":
            return CrossingRows(file, seq_len=seq_len, seed=seed, domain=domain, name=name)
        return WholeRows(file, seq_len=seq_len, end_of_document=end_of_document, seed=seed, domain=domain)

    stream = corpus.streams[domain]
    if stream is None:
        return rows_of(corpus.train[domain], seed)
    return StreamedRows(stream, min_tokens=seq_len + 1 if packing == "wrapped" else 1, seed=seed, rows_of=rows_of)


def _evenly_spaced(numbers: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    if limit is None or limit >= len(numbers):
        return numbers
    return numbers[np.arange(limit, dtype=np.int64) * len(numbers) // limit]


def _nothing_to_predict(corpus: Corpus, domain: int) -> DataError:
    name, num_tokens = corpus.domains[domain], corpus.validation[domain].num_tokens
    if num_tokens > 1:
        return DataError(
            f"data.split: domain {name} has {num_tokens} validation tokens, all of them in a prompt, so there is "
            "nothing to predict; raise data.split.fraction or give it more text"
        )
    return DataError(
        f"data.split: domain {name} has {num_tokens} validation token; a prediction needs 2; raise data.split.fraction "
        "or give it more text"
    )


def _check_vocabulary(rows: SequenceRows, corpus: Corpus, side: Side, domain: int) -> None:
    highest = max(int(part.max(initial=0)) for part in (rows.tokens, rows.targets))
    if highest >= corpus.tokenizer.vocab_size:
        raise DataError(
            f"{corpus.folders[domain]}: token {highest} in the {side} text of domain {corpus.domains[domain]}; ids are "
            f"below {corpus.tokenizer.vocab_size}; the folder is damaged: remove it, and it is built again"
        )


def _batch(
    parts: list[tuple[NDArray[np.int64], SequenceRows]],
    *,
    domain: NDArray[np.int64],
    sample_id: NDArray[np.int64],
    seq_len: int,
) -> Batch:
    """Assemble a batch.

    Args:
        parts: row numbers in the batch, and those rows; all other rows are padding.
        domain: (B,) domain of each row.
        sample_id: (B,) sample_id of each row.
        seq_len: S.
    """
    shape = len(domain), seq_len
    tokens, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    valid, loss_mask = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    document = torch.full(shape, PADDING, dtype=torch.int64)
    for numbers, rows in parts:
        here, is_real = torch.from_numpy(numbers), torch.from_numpy(rows.is_real)
        valid[here] = is_real
        loss_mask[here] = torch.from_numpy(rows.is_learned) & is_real
        tokens[here] = torch.from_numpy(rows.tokens).where(is_real, 0)
        targets[here] = torch.from_numpy(rows.targets).where(is_real, 0)
        document[here] = torch.from_numpy(rows.document).where(is_real, PADDING)

    def expand_rows(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values)[:, None].expand(shape).contiguous()  # (B,) -> (B, S)

    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=loss_mask,
        valid=valid,
        document_id=document,
        position=torch.arange(seq_len).expand(shape).contiguous(),
        domain=expand_rows(domain),
        sample_id=expand_rows(sample_id),
    )
