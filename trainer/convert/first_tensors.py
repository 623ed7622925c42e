"""Sources of the tensors of a run's first checkpoint, each read some indices of dimension 0 at a time."""

from typing import Protocol

import torch
from torch import Tensor

from trainer.checkpoint.streamed import GlobalTensor
from trainer.convert.parent_tensors import ParentTensors
from trainer.models.gpt import GPT
from trainer.models.initialize import WeightShard, initialize
from trainer.models.parameter_roles import parameter_role


class TensorSource(Protocol):
    """Where one tensor comes from."""

    def rows(self, start: int, length: int) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0."""
        ...


class Taken:
    """A tensor of the other model, as it is."""

    def __init__(self, parent: ParentTensors, name: str) -> None:
        self._parent, self._name = parent, name

    def rows(self, start: int, length: int) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0."""
        return self._parent.read(self._name, start, length)


class Constant:
    """A tensor of equal values."""

    def __init__(self, value: float, tensor: GlobalTensor) -> None:
        self._value, self._tensor = value, tensor

    def rows(self, start: int, length: int) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0."""
        shape, dtype = (length, *self._tensor.shape[1:]), getattr(torch, self._tensor.dtype)
        return torch.full(shape, self._value, dtype=dtype)


class Initial:
    """A parameter's initial values, those of a fresh run with the config's seed."""

    def __init__(self, model: GPT, name: str, *, seed: int) -> None:
        """Create a source for a parameter of a whole model on the meta device."""
        self._model, self._name, self._seed = model, name, seed
        self._parameter = model.get_parameter(name)
        self._is_of_experts = parameter_role(name) == "expert"
        self._whole: Tensor | None = None

    def rows(self, start: int, length: int) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0."""
        if self._is_of_experts:  # each has a stream of its own
            return self._drawn(start, length)
        size = self._parameter.shape[0]
        if self._whole is None:
            self._whole = self._drawn(0, size)
        rows = self._whole[start : start + length]
        if start + length == size:
            self._whole = None
        return rows

    def _drawn(self, start: int, length: int) -> Tensor:
        sizes = self._parameter.shape[1:]
        values = torch.empty((length, *sizes), dtype=self._parameter.dtype)
        part = WeightShard(values, (slice(start, start + length), *(slice(0, size) for size in sizes)))
        initialize(self._model, self._seed, {self._name: part}, only={self._name})
        return values


class FirstTensors:
    """All tensors of the first checkpoint, in the dtypes that it has."""

    def __init__(self, tensors: dict[str, GlobalTensor], sources: dict[str, TensorSource]) -> None:
        self._tensors, self._sources = tensors, sources

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return some indices of dimension 0 of a tensor."""
        return self._sources[name].rows(start, length).to(getattr(torch, self._tensors[name].dtype))
