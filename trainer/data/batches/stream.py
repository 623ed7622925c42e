"""Batches for training and for evaluation: rows of the domains, put together.

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
from trainer.data.batches.streamed import StreamedRows, StreamPosition
from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.data.mixture import Mixture
from trainer.data.sources.registry import HfStreamSourceConfig, SourceConfig
from trainer.data.token_cache.shards import TokenFile
from trainer.data.token_cache.skipped import SkippedOf
from trainer.data.token_cache.splits import Side
from trainer.distributed.rank_layout import even_slice
from trainer.errors import DataError

PADDING = -1
"""sample_id of padding rows, and document_id of all padding."""


class TrainStream:
    """The rows of a training run, by number. Holds no position: the caller's slot number is all there is to resume."""

    def __init__(self, corpus: Corpus, *, packing: Packing, seq_len: int, seed: int) -> None:
        """Start the stream.

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

    def waits_for_text(self, first_slot: int, count: int) -> bool:
        """Tell whether rows first_slot .. first_slot + count - 1 have parts of a stream that were not looked at yet.

        All ranks that have asked for the same rows so far get the same answer.
        """
        last = self._last_visits(first_slot, count)
        return any(not rows.is_known(visit) for rows, visit in last)

    def read_on(self, first_slot: int, count: int, *, ahead: bool) -> None:
        """Make the blocks of streams that those rows are of; `ahead`: begin with the next ones behind.

        Raises:
            DataError: if their text is unusable.
        """
        for rows, visit in self._last_visits(first_slot, count):
            rows.read_on(visit, ahead=ahead)

    def places(self, num_slots: int) -> dict[str, Any]:
        """Return where the streams are after the first rows of the run, in JSON values."""
        visits = self.mixture.num_visits(num_slots).tolist()
        return {
            self._corpus.domains[domain]: rows.place(visits[domain]).model_dump()
            for domain, rows in enumerate(self.domain_rows)
            if isinstance(rows, StreamedRows)
        }

    def go_on_from(self, places: Mapping[str, Any]) -> None:
        """Take what `places` returned, so that nothing before it is read again."""
        for name, rows in zip(self._corpus.domains, self.domain_rows, strict=True):
            if isinstance(rows, StreamedRows) and name in places:
                rows.go_on_from(StreamPosition.model_validate(places[name]))

    def skipped(self, sources: Sequence[SourceConfig]) -> list[SkippedOf]:
        """Return what was left out of the text so far: of sources that were ingested, and of blocks that were read.

        Args:
            sources: of the config.
        """
        streams = {s.domain: index for index, s in enumerate(sources) if isinstance(s, HfStreamSourceConfig)}
        found = list(self._corpus.skipped)
        for name, rows in zip(self._corpus.domains, self.domain_rows, strict=True):
            if isinstance(rows, StreamedRows):
                found += [SkippedOf(streams[name], block, info.skipped) for block, info in rows.blocks()]
        return [one for one in found if one.rows.count]

    def _last_visits(self, first_slot: int, count: int) -> list[tuple[StreamedRows, int]]:
        """Return the streams that some rows are of, each with its last visit."""
        if not any(isinstance(rows, StreamedRows) for rows in self.domain_rows):
            return []
        domain, visit = self.mixture.locate(np.arange(first_slot, first_slot + count, dtype=np.int64))
        return [
            (rows, int(visit[domain == index].max()))
            for index, rows in enumerate(self.domain_rows)
            if isinstance(rows, StreamedRows) and (domain == index).any()
        ]

    def epochs(self, num_slots: int) -> dict[str, float | None]:
        """Return how often each domain is read by the first rows of the run; None where that is not known."""
        visits = self.mixture.num_visits(num_slots).tolist()
        counted = zip(self._corpus.domains, self.domain_rows, visits, strict=True)
        return {name: rows.epochs(num_visits) for name, rows, num_visits in counted}

    def micro_batches(
        self, first_slot: int, *, global_batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[Batch]:
        """Return a rank's share of rows first_slot .. first_slot + global_batch_size - 1, cut into equal batches.

        The step has the same rows for any number of ranks and any micro-batch size. Shares are neighbouring rows and
        differ by at most one row; all ranks get as many batches, of one size, filled up with rows that are not valid.
        That size is the least that does with as many batches: padding is computed like everything else.

            7 rows, 2 ranks, batches of 2     rank 0   0 1 | 2 -        rank 1   3 4 | 5 6
            7 rows, 2 ranks, batches of 9     rank 0   0 1 2 -          rank 1   3 4 5 6
        """
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {micro_batch_size}; a batch has at least one row")
        start, end = even_slice(global_batch_size, world_size, rank)
        rows = self.rows(first_slot + start, end - start)
        largest = -(-global_batch_size // world_size)
        num_batches = -(-largest // micro_batch_size)
        size = -(-largest // num_batches)
        return [pad_rows(row_slice(rows, size * i, size * (i + 1)), size) for i in range(num_batches)]


def pad_rows(batch: Batch, num_rows: int) -> Batch:
    """Return the batch with padding below its rows: not valid, token 0, domain 0, sample_id PADDING.

    Raises:
        ValueError: if the batch has more rows already.
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
    """Yield a domain's validation text as batches of `batch_size` rows; sample_id is the number of the row.

    Args:
        corpus: whose text.
        domain_index: which of its domains.
        packing: how its rows are made; see `Windows` and `PackedDocuments`.
        seq_len: S.
        batch_size: B; the last batch is filled up with rows that are not valid.
        max_tokens: at most this many positions, in evenly spaced rows of those that have a target, though never less
            than one row. None: the whole text.

    Raises:
        DataError: if there is no token to predict, or an id outside the vocabulary.
    """
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}; both are at least 1")
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
    """Return rows first .. end - 1 of a batch, as far as it has them."""
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
            f"data.split: domain {name} has {num_tokens} validation tokens, all of a prompt, and none of them is "
            "learned; raise data.split.fraction or give it more text"
        )
    return DataError(
        f"data.split: domain {name} has {num_tokens} validation token; one is predicted from another, so 2 are needed; "
        "raise data.split.fraction or give it more text"
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
    """Make a batch.

    Args:
        parts: numbers of rows in the batch, and those rows; what no part has is padding.
        domain: (B,).
        sample_id: (B,).
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

    def whole_rows(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values)[:, None].expand(shape).contiguous()  # (B,) -> (B, S)

    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=loss_mask,
        valid=valid,
        document_id=document,
        position=torch.arange(seq_len).expand(shape).contiguous(),
        domain=whole_rows(domain),
        sample_id=whole_rows(sample_id),
    )
