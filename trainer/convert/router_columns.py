"""Routers of layers whose experts are taken from another layer: each column of a router belongs to one expert.

# E experts, n null experts.
"""

import torch
from torch import Tensor, nn

from trainer.models.config import ModelConfig
from trainer.moe.build_router import build_router
from trainer.moe.routing import Router


def expert_dimensions(config: ModelConfig, layer: int) -> dict[str, int]:
    """Return the dimension that counts experts, of each parameter and buffer of a layer's router that has one.

    Found by comparing with a router of twice as many experts, so it holds for every router, plug-ins too.
    """
    assert config.moe is not None, "the layer has experts"
    shapes = []
    for times in (1, 2):
        with torch.device("meta"):
            num_experts = times * config.moe.num_experts
            router = build_router(config.moe.router, d_model=config.d_model, num_experts=num_experts, layer=layer)
        shapes.append({name: tensor.shape for name, tensor in tensors_of(router).items()})
    return {
        name: next(dim for dim, size in enumerate(shape) if size != shapes[1][name][dim])
        for name, shape in shapes[0].items()
        if shape != shapes[1][name]
    }


@torch.no_grad()
def copy_router(old: Router, new: Router, dimensions: dict[str, int], experts: Tensor, *, num_old: int) -> None:
    """Copy a router whose new expert i is expert `experts[i]` of the `num_old` old ones.

    Null experts keep their columns; if the new router has twice as many, each is there twice.
    """
    theirs = tensors_of(old)
    for name, tensor in tensors_of(new).items():
        value = theirs[name]
        if name in dimensions:
            dim = dimensions[name]
            nulls = torch.arange(num_old, value.shape[dim])
            if len(nulls):
                nulls = nulls.repeat_interleave((tensor.shape[dim] - len(experts)) // len(nulls))
            value = value.index_select(dim, torch.cat([experts, nulls]).to(value.device))
        tensor.copy_(value)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
