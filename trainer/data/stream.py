"""Batches for training and for evaluation, cut from the token files.

# B rows, S tokens in a row.
"""

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.corpus import Corpus
from trainer.data.sampler import Sampler
from trainer.data.splits import Side
from trainer.distributed.layout import even_slice
from trainer.errors import DataError

FILLING = -1
"""sample_id of filling rows."""


class TrainStream:
    """The rows of a training run, by number. Holds no position: the caller's slot number is all there is to resume."""

    def __init__(self, corpus: Corpus, *, seq_len: int, seed: int) -> None:
        """Start the stream.

        Raises:
            DataError: if a domain is shorter than one row or its weight too small to be drawn.
        """
        self._corpus = corpus
        self._seq_len = seq_len
        self.sampler = Sampler(
            domains=corpus.domains,
            num_tokens=[file.num_tokens for file in corpus.train],
            weights=corpus.weights,
            seq_len=seq_len,
            seed=seed,
        )

    def rows(self, first_slot: int, count: int) -> Batch:
        """Return rows first_slot .. first_slot + count - 1 as one batch of `count` rows; sample_id is the slot.

        Raises:
            DataError: if a token file holds an id outside the vocabulary.
        """
        slots = np.arange(first_slot, first_slot + count, dtype=np.int64)
        location = self.sampler.locate(slots)
        windows = np.empty((count, self._seq_len + 1), dtype=np.int64)
        document = np.empty((count, self._seq_len), dtype=np.int64)
        for domain in np.unique(location.domain).tolist():
            here = location.domain == domain
            windows[here], document[here] = _read(self._corpus, "train", domain, location.start[here], self._seq_len)
        real = np.ones((count, self._seq_len), dtype=bool)
        return _batch(windows, document, real=real, domain=location.domain, sample_id=slots)

    def micro_batches(
        self, first_slot: int, *, global_batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[Batch]:
        """Return a rank's share of rows first_slot .. first_slot + global_batch_size - 1, cut into equal batches.

        The step has the same rows for any number of ranks and any micro-batch size. Shares are neighbouring rows and
        differ by at most one row; all ranks get as many batches, of one size, filled up with rows that are not valid.
        That size is the least that does with as many batches: filling is computed like everything else.

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
        return [fill_rows(row_slice(rows, size * i, size * (i + 1)), size) for i in range(num_batches)]


def fill_rows(batch: Batch, num_rows: int) -> Batch:
    """Return the batch with filling below its rows: not valid, token 0, domain 0, sample_id FILLING.

    Raises:
        ValueError: if the batch has more rows already.
    """
    present, seq_len = batch.tokens.shape
    if present > num_rows:
        raise ValueError(f"{present} rows do not fit in {num_rows}")
    if present == num_rows:
        return batch
    missing = num_rows - present
    filling = _batch(
        np.zeros((missing, seq_len + 1), dtype=np.int64),
        np.zeros((missing, seq_len), dtype=np.int64),
        real=np.zeros((missing, seq_len), dtype=bool),
        domain=np.zeros(missing, dtype=np.int64),
        sample_id=np.full(missing, FILLING, dtype=np.int64),
    )
    return Batch(**{f.name: torch.cat([getattr(batch, f.name), getattr(filling, f.name)]) for f in fields(Batch)})


def evaluation_batches(
    corpus: Corpus, domain_index: int, *, seq_len: int, batch_size: int, max_tokens: int | None
) -> Iterator[Batch]:
    """Yield a domain's validation text as batches of `batch_size` rows; sample_id is the number of the window.

    Windows do not overlap: every token but the first is predicted exactly once, from those before it in its window.

        tokens    t0 t1 t2 t3 t4 t5 t6 t7 t8          S = 3
        window 0  t0 t1 t2           -> t1 t2 t3
        window 2                    t6 t7 --  -> t7 t8 --    -- is not valid

    Args:
        corpus: whose text.
        domain_index: which of its domains.
        seq_len: S.
        batch_size: B; the last batch is filled up with rows that are not valid.
        max_tokens: at most this many predictions, in evenly spaced windows, though never less than one window.
            None: the whole text.

    Raises:
        DataError: if there is no token to predict, or an id outside the vocabulary.
    """
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}; both are at least 1")
    num_predicted = corpus.validation[domain_index].num_tokens - 1
    if num_predicted < 1:
        raise DataError(
            f"data.split: domain {corpus.domains[domain_index]} has {num_predicted + 1} validation token; one is "
            "predicted from another, so 2 are needed; raise data.split.fraction or give it more text"
        )
    windows = _evenly_spaced(
        -(-num_predicted // seq_len), None if max_tokens is None else max(max_tokens // seq_len, 1)
    )
    for first in range(0, len(windows), batch_size):
        sample_id = windows[first : first + batch_size]
        positions = sample_id[:, None] * seq_len + np.arange(seq_len)  # (B, S)
        tokens, document = _read(corpus, "validation", domain_index, sample_id * seq_len, seq_len)
        batch = _batch(
            tokens,
            document,
            real=positions < num_predicted,
            domain=np.full(len(sample_id), domain_index, dtype=np.int64),
            sample_id=sample_id,
        )
        yield fill_rows(batch, batch_size)


def _evenly_spaced(num_windows: int, limit: int | None) -> NDArray[np.int64]:
    if limit is None or limit >= num_windows:
        return np.arange(num_windows, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * num_windows // limit


def _read(
    corpus: Corpus, side: Side, domain: int, starts: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return tokens (B, S + 1) and document numbers (B, S) from `starts` (B,) on; 0 beyond the end of the text."""
    file = (corpus.train if side == "train" else corpus.validation)[domain]
    positions = starts[:, None] + np.arange(seq_len + 1)  # (B, S + 1)
    inside = positions < file.num_tokens
    positions = np.minimum(positions, file.num_tokens - 1)
    tokens = file.tokens[positions]
    highest = int(tokens.max(initial=0))
    if highest >= corpus.tokenizer.vocab_size:
        raise DataError(
            f"{corpus.folder}: token {highest} in the {side} text of domain {corpus.domains[domain]}; ids are below "
            f"{corpus.tokenizer.vocab_size}; the folder is damaged: remove it, and it is built again"
        )
    return np.where(inside, tokens, 0).astype(np.int64), file.document_of(positions[:, :-1])


def _batch(
    windows: NDArray[np.int64],
    document: NDArray[np.int64],
    *,
    real: NDArray[np.bool_],
    domain: NDArray[np.int64],
    sample_id: NDArray[np.int64],
) -> Batch:
    """Make a batch of windows (B, S + 1); document and real are (B, S), domain and sample_id (B,)."""
    num_rows, seq_len = real.shape
    valid = torch.from_numpy(real)
    tokens, targets = (torch.from_numpy(windows[:, part]) for part in (slice(0, -1), slice(1, None)))

    def whole_rows(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values)[:, None].expand(num_rows, seq_len).contiguous()  # (B,) -> (B, S)

    return Batch(
        tokens=tokens.where(valid, 0),
        targets=targets.where(valid, 0),
        loss_mask=valid.clone(),
        valid=valid,
        document_id=torch.from_numpy(document).where(valid, 0),
        position=torch.arange(seq_len).expand(num_rows, seq_len).contiguous(),
        domain=whole_rows(domain),
        sample_id=whole_rows(sample_id),
    )


def row_slice(batch: Batch, first: int, end: int) -> Batch:
    """Return rows first .. end - 1 of a batch, as far as it has them."""
    return Batch(**{f.name: getattr(batch, f.name)[first:end] for f in fields(Batch)})
