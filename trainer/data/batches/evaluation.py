"""Validation text in batches."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from trainer.data.batches.assemble import assemble, check_vocabulary, pad_rows
from trainer.data.batches.batch import Batch
from trainer.data.batches.packed_rows import PackedDocuments
from trainer.data.batches.wrapped_rows import Windows
from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.errors import DataError


def batches_of_all_domains(
    corpus: Corpus, *, packing: Packing, seq_len: int, batch_size: int, max_tokens: int | None
) -> Iterator[Batch]:
    """Yield the validation text of one domain after the other, as `evaluation_batches`; `max_tokens` is of each."""
    for domain in range(len(corpus.domains)):
        yield from evaluation_batches(
            corpus, domain, packing=packing, seq_len=seq_len, batch_size=batch_size, max_tokens=max_tokens
        )


def evaluation_batches(
    corpus: Corpus, domain_index: int, *, packing: Packing, seq_len: int, batch_size: int, max_tokens: int | None
) -> Iterator[Batch]:
    """Yield the validation text of a domain in batches of `batch_size` rows; sample_id is the number of the row.

    Padding rows fill up the last batch. `max_tokens` limits the positions, but not below one row: rows are then evenly
    spaced among those with a target. All documents weigh 1. See `Windows` and `PackedDocuments` for the packing. Raises
    DataError if there is no token to predict, or an id outside the vocabulary.
    """
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}; both must be at least 1")
    file = replace(corpus.validation[domain_index], weights=None)
    if packing == "bfd":
        text = PackedDocuments(file, seq_len=seq_len, end_of_document=corpus.tokenizer.end_of_document)
    else:
        text = Windows(file, seq_len=seq_len)
    numbers = text.with_targets()
    if not len(numbers):
        what = f"{file.num_tokens} validation token; a prediction needs 2"
        if file.num_tokens > 1:
            what = f"{file.num_tokens} validation tokens, all of them in a prompt, so there is nothing to predict"
        domain = f"data.split: domain {corpus.domains[domain_index]}"
        raise DataError(f"{domain} has {what}; raise data.split.fraction or give it more text")
    limit = len(numbers) if max_tokens is None else min(max(max_tokens // seq_len, 1), len(numbers))
    numbers = numbers[np.arange(limit, dtype=np.int64) * len(numbers) // limit]
    for first in range(0, len(numbers), batch_size):
        sample_id = numbers[first : first + batch_size]
        rows = text.read(sample_id)
        check_vocabulary(rows, corpus, "validation", domain_index)
        parts, domain = [(np.arange(len(sample_id)), rows)], np.full_like(sample_id, domain_index)
        yield pad_rows(assemble(parts, domain=domain, sample_id=sample_id, seq_len=seq_len), batch_size)
