"""What a checkpoint holds: named tensors, each a slice of a global one, and a few plain values."""

from dataclasses import dataclass, field
from typing import Self

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A contiguous part of a global tensor along dimension 0; the whole of it in one process."""

    tensor: Tensor
    global_shape: tuple[int, ...]
    start: int = 0
    """First index of dimension 0 that is here."""

    @property
    def is_whole(self) -> bool:
        """Tell whether this is all of the global tensor."""
        return tuple(self.tensor.shape) == self.global_shape

    @classmethod
    def whole(cls, tensor: Tensor) -> Self:
        """Return a slice that is all of its tensor."""
        return cls(tensor=tensor, global_shape=tuple(tensor.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Everything that the next step depends on. Names never contain a rank."""

    slices: dict[str, Slice] = field(default_factory=dict)
    values: dict[str, int | float | str] = field(default_factory=dict)
