"""One micro-batch: what the model reads and what is known of every token.

# B rows, S tokens in a row.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B rows of S tokens; every field is (B, S)."""

    tokens: Tensor
    """int64 token ids."""
    targets: Tensor
    """int64 ids of the token after each one."""
    loss_mask: Tensor
    """bool: this position's target counts in the loss."""
    valid: Tensor
    """bool: a real token. False is padding: it is never routed and never counted."""
    document_id: Tensor
    """int64 running number of the document inside its domain; -1 for padding."""
    position: Tensor
    """int64 column in the row, from 0; what rotary positions and noise are functions of."""
    domain: Tensor
    """int64 index into the corpus's domains."""
    sample_id: Tensor
    """int64 number of the row in the run, of which no two training rows share one; -1 for padding rows."""

    @property
    def target_mask(self) -> Tensor:
        """(B, S) bool: positions that are counted in the loss."""
        return self.loss_mask & self.valid

    def to(self, device: torch.device) -> Self:
        """Return the batch on `device`."""
        return type(self)(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})
