"""The seam of pipelines, where a model is evaluated and generates: layers that are elsewhere.

All ranks that have layers of one model call it with the same tokens. Each runs its stages once it has the residual
stream before them, and all get what is computed after the last layer.

# B rows, S tokens in a row, D d_model.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class LayerRelay(Protocol):
    """Takes the residual stream from layers that are elsewhere, and hands it on to them."""

    layers: Sequence[range]
    """Layers of each stage here, in order."""
    has_last: bool
    """True if the last layer is here."""

    def before(self, layers: range, shape: torch.Size) -> Tensor:
        """Return the residual stream (B, S, D) before a stage here that is not the first; `shape` is (B, S)."""
        ...

    def after(self, layers: range, hidden: Tensor) -> None:
        """Hand on the residual stream after a stage here that is not the last."""
        ...

    def shared(self, found: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return on all ranks what the one with the last layer has found; the others found None."""
        ...
