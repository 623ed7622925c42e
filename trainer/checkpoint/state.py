"""Training state: named tensors, each a slice of a global one, and a few scalars."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A contiguous part of a global tensor along dimension 0; all of it in a single process."""

    tensor: Tensor
    global_shape: tuple[int, ...]
    start: int = 0
    """First local index of dimension 0."""
    is_of_experts: bool = False
    is_frozen: bool = False
    """A weight that does not learn, so that it has no moments."""

    @property
    def length(self) -> int:
        """Number of local indices of dimension 0; 1 for a tensor without dimensions."""
        return self.tensor.shape[0] if self.tensor.dim() else 1

    @classmethod
    def whole(cls, tensor: Tensor) -> Self:
        """Return a slice that covers its whole tensor."""
        return cls(tensor=tensor, global_shape=tuple(tensor.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Everything that the next step depends on. Names are global: they never contain a rank."""

    slices: Mapping[str, Slice] = field(default_factory=dict)
    values: Mapping[str, int | float | str] = field(default_factory=dict)
