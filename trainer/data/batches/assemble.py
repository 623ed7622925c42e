"""Assembly of batches from rows of the domains, and their padding.

# B rows, S tokens in a row.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.data.batches.row_order import SequenceRows
from trainer.data.corpus import Corpus
from trainer.data.token_cache.splits import Side
from trainer.errors import DataError

PADDING = -1  # sample_id of padding rows, and document_id of all padding


def assemble(
    parts: list[tuple[NDArray[np.int64], SequenceRows]], *, domain: NDArray, sample_id: NDArray, seq_len: int
) -> Batch:
    """Assemble a batch from row numbers and the rows there; all other rows are padding.

    `domain` and `sample_id` are (B,) int64.
    """
    shape = len(domain), seq_len
    tokens, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    has_weights = any(rows.loss_mask.dtype != np.bool_ for _, rows in parts)
    loss_mask = torch.zeros(shape, dtype=torch.float64 if has_weights else torch.bool)
    valid = torch.zeros(shape, dtype=torch.bool)
    document = torch.full(shape, PADDING, dtype=torch.int64)
    experts = None
    for numbers, rows in parts:
        here, is_real = torch.from_numpy(numbers), torch.from_numpy(rows.is_real)
        valid[here] = is_real
        loss_mask[here] = torch.from_numpy(rows.loss_mask).where(is_real, False).to(loss_mask.dtype)
        tokens[here] = torch.from_numpy(rows.tokens).where(is_real, 0)
        targets[here] = torch.from_numpy(rows.targets).where(is_real, 0)
        document[here] = torch.from_numpy(rows.document).where(is_real, PADDING)
        if rows.experts is not None:
            assert len(numbers) == shape[0], "rows with experts are not mixed with others"
            experts = torch.empty(*shape, *rows.experts.shape[2:], dtype=torch.int32)
            experts[here] = torch.from_numpy(rows.experts).to(torch.int32)

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
        experts=experts,
    )


def pad_rows(batch: Batch, num_rows: int) -> Batch:
    """Append padding rows to a batch of at most `num_rows`: not valid, token 0, domain 0, sample_id PADDING."""
    present, seq_len = batch.tokens.shape
    if present > num_rows:
        raise ValueError(f"{present} rows do not fit in {num_rows}")
    if present == num_rows:
        return batch
    domain = np.zeros(num_rows - present, dtype=np.int64)
    padding = assemble([], domain=domain, sample_id=np.full_like(domain, PADDING), seq_len=seq_len)
    if batch.experts is not None:
        padding = replace(padding, experts=any_experts(batch.experts, num_rows - present))
    further = padding.tensors()
    return Batch(**{name: torch.cat([tensor, further[name]]) for name, tensor in batch.tensors().items()})


def row_slice(batch: Batch, first: int, end: int) -> Batch:
    """Return rows first .. end - 1 of a batch, or fewer if it ends before."""
    return Batch(**{name: tensor[first:end] for name, tensor in batch.tensors().items()})


def any_experts(like: Tensor, num_rows: int) -> Tensor:
    """Return experts (num_rows, S, L, k) of padding, given those of a batch: the first k, which nobody uses."""
    return torch.arange(like.shape[-1]).to(like).expand(num_rows, *like.shape[1:]).clone()


def check_vocabulary(rows: SequenceRows, corpus: Corpus, side: Side, domain: int) -> None:
    """Raise DataError naming the cache folder, if a token of the rows is outside the vocabulary."""
    highest = max(int(part.max(initial=0)) for part in (rows.tokens, rows.targets))
    if highest >= corpus.tokenizer.vocab_size:
        raise DataError(
            f"{corpus.folders[domain]}: token {highest} in the {side} text of domain {corpus.domains[domain]}; ids are "
            f"below {corpus.tokenizer.vocab_size}; the folder is damaged: remove it, and it is built again"
        )
