"""Training state: named tensors, each a slice of a global one, and a few scalars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from trainer.checkpoint.coverage import spans_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a global tensor along dimension 0; all of it in a single process."""

    tensor: Tensor
    global_shape: tuple[int, ...]
    start: int = 0
    """First local index of dimension 0."""
    numbers: tuple[int, ...] | None = None
    """Global index of each local index of dimension 0, if they are not consecutive (`parallel.placement`)."""
    is_of_experts: bool = False
    is_frozen: bool = False
    """A weight that does not learn, so that it has no moments."""

    @property
    def length(self) -> int:
        """Number of local indices of dimension 0; 1 for a tensor without dimensions."""
        return self.tensor.shape[0] if self.tensor.dim() else 1

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """Runs of consecutive global indices: local index of the first one, its global index, and their number."""
        return [(0, self.start, self.length)] if self.numbers is None else spans_of(self.numbers)

    def at(self, numbers: Sequence[int]) -> Self:
        """Return the slice whose local indices have these global indices."""
        runs = spans_of(numbers)
        return replace(self, start=runs[0][1] if runs else 0, numbers=tuple(numbers) if len(runs) > 1 else None)

    def part(self, first: int, tensor: Tensor) -> Self:
        """Return the slice with `tensor` as its local indices from `first` on."""
        if self.numbers is None:
            return replace(self, tensor=tensor, start=self.start + first)
        return replace(self, tensor=tensor).at(self.numbers[first : first + len(tensor)])

    @classmethod
    def whole(cls, tensor: Tensor) -> Self:
        """Return a slice that covers its whole tensor."""
        return cls(tensor=tensor, global_shape=tuple(tensor.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Everything that the next step depends on. Names are global: they never contain a rank."""

    slices: Mapping[str, Slice] = field(default_factory=dict)
    values: Mapping[str, int | float | str] = field(default_factory=dict)
