"""Low-rank additions to the experts' matrices: W_e + s B_e A_e, of which only A and B are ever stored (LoRA).

    z = x W^T + s (x A^T) B^T      u = s x A^T is computed again in the backward pass: nothing more is saved
    v = s dz B                     dx = dz W + v A,  dA = v^T x,  dB = dz^T u

Source: LoRA (arXiv 2106.09685), for each expert by itself.

# R rows, E experts, K and N widths of a product, r rank.
"""

from typing import Final, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LowRank(NamedTuple):
    """Addition s B_e A_e to the matrix (N, K) of each expert."""

    a: Tensor
    """(E, r, K)."""
    b: Tensor
    """(E, N, r)."""
    scale: float
    """The factor s."""

    def of_rows(self, rows: Tensor, *, multiple: int = 1) -> "LowRank":
        """Return the same in the dtype of some rows, the rank filled up with zeros to a multiple."""
        a, b = self.a.to(rows.dtype), self.b.to(rows.dtype)
        if missing := -self.a.shape[1] % multiple:
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        return LowRank(a, b, self.scale)


class LowRankGradients(NamedTuple):
    """Gradients of the two factors, in their dtypes."""

    a: Tensor
    """(E, r, K)."""
    b: Tensor
    """(E, N, r)."""


class ExpertAdapters(NamedTuple):
    """Additions to the experts' two matrices; None: that matrix has none."""

    w_in: LowRank | None
    w_out: LowRank | None

    def of_rows(self, rows: Tensor, *, multiple: int = 1) -> "ExpertAdapters":
        """Return the same in the dtype of some rows, ranks filled up with zeros to a multiple."""
        return ExpertAdapters(*(None if low is None else low.of_rows(rows, multiple=multiple) for low in self))


NO_ADAPTERS: Final = ExpertAdapters(None, None)
