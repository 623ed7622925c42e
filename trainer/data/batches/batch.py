"""A micro-batch: token ids, and what loss, attention and metrics need of every token.

# B rows, S tokens in a row.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)  # no slots: the counts are cached
class Batch:
    """B rows of S tokens; every field is (B, S), but the last two."""

    tokens: Tensor
    """int64 token ids."""
    targets: Tensor
    """int64 id of the next token."""
    loss_mask: Tensor
    """bool: the target of this position counts in the loss; or float64: its weight there, 0 or more."""
    valid: Tensor
    """bool: a real token. False is padding, which is neither routed nor counted."""
    document_id: Tensor
    """int64 number of the document in its domain; -1 for padding."""
    position: Tensor
    """int64 column in the row, from 0; input of rotary embedding and noise."""
    domain: Tensor
    """int64 index into the corpus's domains."""
    sample_id: Tensor
    """int64 number of the row in the run, unique among training rows; -1 for padding rows."""
    experts: Tensor | None = None
    """(B, S, L, k) uint8 or int32 ids of the experts to replay in each of the L MoE layers; None: the routers choose.

    Padding has any k experts.
    """
    row_document_id: Tensor | None = None
    """(B, S of the whole rows) their `document_id`, if the batch has a part of each row only; None: rows are whole."""

    @classmethod
    def of_whole_rows(cls, tokens: Tensor, targets: Tensor, *, first_sample: int = 0) -> Self:
        """Return rows (B, S) of one document each, without padding, numbered from a first; all targets count."""
        yes, zero = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
        B, S = tokens.shape
        return cls(
            tokens=tokens,
            targets=targets,
            loss_mask=yes,
            valid=yes,
            document_id=zero,
            position=torch.arange(S).expand(B, S).contiguous(),
            domain=zero,
            sample_id=zero + torch.arange(first_sample, first_sample + B)[:, None],
        )

    @property
    def target_mask(self) -> Tensor:
        """(B, S) of `loss_mask`'s dtype: positions that count in the loss, or their weights."""
        return self.loss_mask & self.valid if self.loss_mask.dtype == torch.bool else self.loss_mask * self.valid

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def num_valid(self) -> int:
        """Number of valid tokens; waits for the device, unless it was counted before the batch went there."""
        return int(self.valid.sum())

    @cached_property
    def target_weight(self) -> float:
        """Sum of the weights in the loss: without weights, the number of targets. Waits as `num_valid` does."""
        return float(self.target_mask.sum(dtype=torch.float64))

    def to(self, device: torch.device) -> Self:
        """Return a copy of the batch on `device`, with its tokens counted where they are now: on the host.

        A GPU copies from pinned memory while the host goes on: all micro-batches of a step are under way, or there,
        before the first one is computed.
        """
        tensors = self.tensors()
        if device.type == "cuda":
            tensors = {name: t.pin_memory() if t.device.type == "cpu" else t for name, t in tensors.items()}
        copy = type(self)(**{name: t.to(device, non_blocking=True) for name, t in tensors.items()})
        copy.__dict__.update(num_valid=self.num_valid, target_weight=self.target_weight)
        return copy
