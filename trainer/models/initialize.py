"""Initial weights: every tensor is a function of the seed, its name and the global expert index, not of the layout.

A rank that holds a shard draws what comes before it in the tensor, or in each expert, and keeps its shard only.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.models.config import NORM_START
from trainer.models.drawn_slice import fill, normal_pieces, uniform_pieces
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import FACTOR_A, FACTOR_B, initial_std, is_matrix, parameter_role
from trainer.moe.experts import Experts
from trainer.moe.routing import Router
from trainer.ops.cut import Cut
from trainer.ops.noise import stable_hash

# E experts.


@dataclass(frozen=True, slots=True)
class WeightShard:
    """A part of a weight."""

    local: Tensor
    index: tuple[slice, ...]
    """Where it is in the weight, or in the cut of it: a range of every dimension, with beginning and end."""
    cut: Cut | None = None
    """Cut of the whole weight that the part is of; None: the part is of the whole weight."""


@torch.no_grad()
def initialize(
    model: GPT,
    seed: int,
    shards: Mapping[str, WeightShard] | None = None,
    *,
    only: Collection[str] | None = None,
) -> None:
    """Initialize every parameter and buffer of a model, on its device; of parameters in `shards` only that part.

    Of parameters, `only` these are initialized if they are given.

    Each expert of a stacked (E, ...) weight has its own random stream, so that it starts from the same weights on any
    rank. Parameters that are not matrices are constant: norms multiply by 1, those of a router are its
    `initial_values`, biases and sinks 0. So is the second factor of an adapter.
    """
    numbers, router_values = expert_parameters(model), _router_values(model)
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        config = model.config
        values = normal_pieces(initial_std(name, init_std=config.init_std, num_layers=config.num_layers))
        part = (shards or {}).get(name) or WeightShard(parameter, tuple(slice(0, size) for size in parameter.shape))
        shape = parameter.shape if part.cut is None else part.cut.whole_shape(parameter.shape)
        if name.endswith(FACTOR_A):  # as nn.Linear and peft begin
            values = uniform_pieces(shape[-1] ** -0.5)
        match parameter_role(name):
            case "norm":
                part.local.fill_(NORM_START[model.config.norm])
            case _ if name.endswith(FACTOR_B):
                part.local.zero_()
            case _ if not is_matrix(name, parameter):
                part.local.fill_(router_values.get(name, 0.0))
            case "expert":
                experts, *inside = part.index
                for weight, e in zip(part.local, range(experts.start, experts.stop), strict=True):
                    seed_of_e = stable_hash("init", seed, name, numbers[name][e])
                    fill(weight, values, seed_of_e, shape=parameter.shape[1:], index=inside)
            case _:
                cut = part.cut or Cut(0, parameter.shape[0], ((0, parameter.shape[0]),))
                for here, index in cut.pieces(part.index):
                    piece = part.local.narrow(cut.dim, here.start, here.stop - here.start)
                    fill(piece, values, stable_hash("init", seed, name), shape=shape, index=index)
    for buffer in model.buffers():
        buffer.zero_()


def expert_parameters(model: GPT) -> dict[str, tuple[int, ...]]:
    """Return the global index of each expert of every stacked (E_local, ...) weight, by name."""
    return {
        f"{prefix}.{name}": module.numbers
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }


def _router_values(model: GPT) -> dict[str, float]:
    """Return the routers' `initial_values`, by full parameter name."""
    return {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        if isinstance(module, Router)
        for name, value in module.initial_values.items()
    }
