"""Slices of global tensors that a rank holds: its experts, its heads and hidden units, its shards."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from trainer.checkpoint.coverage import AVERAGE, WEIGHT
from trainer.checkpoint.state import Slice
from trainer.models.gpt import GPT
from trainer.models.initialize import expert_parameters
from trainer.parallel.shards import copy_from_rows, first_row, local, rows, shard_dimension, shard_start
from trainer.parallel.tensor_parallel import CutParameter, cut_parameters

SlicePurpose = Literal["state", "held", "wanted"]
"""For the state of a checkpoint; to compare copies, as a rank holds them; to be loaded, where values do not matter."""


class StateSlices:
    """Slices of global tensors that a rank holds, by the names of the tensors in a state."""

    def __init__(self, model: GPT) -> None:
        self.expert_numbers, self.cut_parameters = expert_parameters(model), cut_parameters(model)
        self._num_experts = 0 if model.config.moe is None else model.config.moe.num_experts
        self._frozen = {name for name, p in model.named_parameters() if not p.requires_grad}

    def of(self, name: str, tensor: Tensor, *, purpose: SlicePurpose = "state") -> Slice:
        """Return this rank's slice of a global tensor: its own experts, and its shard of a sharded tensor.

        If the tensor is sharded, or cut, along another dimension than 0, a slice of the state is collective; the others
        are not: what is wanted are all rows, without values, and what is held has another start on each rank.
        """
        parameter = _parameter_of(name)
        is_frozen = name.startswith(WEIGHT) and parameter in self._frozen
        if (cut := self.cut_parameters.get(parameter)) is not None:
            return replace(_slice_of_cut(cut, tensor, purpose), is_frozen=is_frozen)
        numbers, shape = self.expert_numbers.get(parameter), tuple(tensor.shape)
        if numbers is not None:
            shape = (self._num_experts, *shape[1:])
        start = 0
        if shard_dimension(tensor) != 0 and purpose == "wanted":
            mine = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        elif purpose == "held":
            start, mine = shard_start(tensor), local(tensor)
        else:
            start, mine = first_row(tensor), rows(tensor)
        marks = {"is_of_experts": numbers is not None, "is_frozen": is_frozen}
        if numbers is None:
            return Slice(tensor=mine, global_shape=shape, start=start, **marks)
        if purpose == "held":  # another start for each rank's experts and each shard
            return Slice(tensor=mine, global_shape=shape, start=numbers[0] + start * shape[0], **marks)
        return Slice(tensor=mine, global_shape=shape, **marks).at(numbers[start : start + len(mine)])

    def copy(self, name: str, tensor: Tensor, part: Tensor) -> None:
        """Overwrite this rank's shard of a tensor by the values of the slice that is wanted of it."""
        found = self.cut_parameters.get(_parameter_of(name))
        copy_from_rows(tensor, part if found is None or found.own.dim == 0 else found.own.of(part))


def _slice_of_cut(found: CutParameter, tensor: Tensor, purpose: SlicePurpose) -> Slice:
    """Return this rank's slice of a tensor that tensor-parallel ranks cut; whole rows, as files have them."""
    cut, mine, start = found.own, local(tensor), first_row(tensor)
    part = Slice(tensor=mine, global_shape=cut.whole_shape(tensor.shape), start=start)
    if purpose == "held":  # another start for each cut and each shard
        return replace(part, start=found.group.index * part.global_shape[0] + start)
    if cut.dim == 0:
        return part.at(cut.numbers[start : start + len(mine)])
    if purpose == "wanted":
        return replace(part, tensor=torch.empty((len(mine), cut.size), dtype=tensor.dtype, device="meta"))
    first, whole = found.whole_rows(mine)
    return replace(part, tensor=whole, start=start + first)


def _parameter_of(name: str) -> str:
    """Return the name of the parameter that a tensor of a state belongs to: model.NAME, optim.exp_avg.NAME."""
    return name.partition(".")[2] if name.startswith((WEIGHT, AVERAGE)) else name.split(".", 2)[-1]
