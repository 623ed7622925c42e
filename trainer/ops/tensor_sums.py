"""Dataclasses of sums, which are added and all-reduced field by field."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSums:
    """Base class of dataclasses whose fields are all tensors, or None where a sum does not exist."""

    def tensors(self) -> list[Tensor]:
        """Return the sums that exist, in the order of the fields."""
        return [tensor for tensor in self._values().values() if tensor is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """Return a copy with these values in place of `tensors()`, cast to the dtypes of those."""
        values = iter(tensors)
        return replace(
            self, **{name: None if old is None else next(values).to(old.dtype) for name, old in self._values().items()}
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with each sum changed."""
        return self.with_tensors([change(tensor) for tensor in self.tensors()])

    def on_host(self, more: Tensor | None = None) -> tuple[Self, Tensor | None]:
        """Return a copy on the CPU, and one of a further tensor, made at once: a single wait for the device."""
        parts = self.tensors() if more is None else [*self.tensors(), more]
        copies = from_message(as_message(parts).cpu(), parts)
        return self.with_tensors(copies[: len(self.tensors())]), None if more is None else copies[-1].to(more.dtype)

    def __add__(self, other: Self) -> Self:
        """Add the sums of two disjoint sets of tokens."""
        return self.with_tensors([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])

    def _values(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def as_message(parts: Sequence[Tensor]) -> Tensor:
    """Return small tensors as one message of float64, which represents every count exactly."""
    return torch.cat([part.reshape(-1).double() for part in parts])


def from_message(message: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of a message, in the shapes of those that were packed."""
    pieces = message.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
