"""Models whose experts are those of another model in another number: removed, repeated, halved.

# E experts before, E' after.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from trainer.convert.hidden_units import HiddenUnits
from trainer.convert.router_columns import copy_router, expert_dimensions, tensors_of
from trainer.models.gpt import GPT
from trainer.moe.layer import MoE


def moe_layers_of(model: GPT) -> dict[int, MoE]:
    """Return the MoE layers of a model by the number of their block."""
    return {layer: cast(MoE, model.blocks[layer].ffn) for layer in model.config.moe_layers}


@torch.no_grad()
def take_experts(old: GPT, new: GPT, sources: Mapping[int, Sequence[int]]) -> None:
    """Fill a model with the weights of another one; expert i of layer l is expert `sources[l][i]` of the other.

    Experts of another width are left to the caller.
    """
    copy_outside(old, new, [f"blocks.{layer}.ffn.{part}." for layer in sources for part in ("experts", "router")])
    before, after = moe_layers_of(old), moe_layers_of(new)
    for layer, experts in sources.items():
        mine, theirs = after[layer], before[layer]
        copy_router(
            theirs.router,
            mine.router,
            expert_dimensions(old.config, layer),
            torch.tensor(experts),
            num_old=theirs.experts.num_experts,
        )
        if mine.experts.w_in.shape[1:] == theirs.experts.w_in.shape[1:]:
            for i, e in enumerate(experts):
                HiddenUnits.of_expert(theirs.experts, e).copy_to(HiddenUnits.of_expert(mine.experts, i))


@torch.no_grad()
def copy_outside(old: GPT, new: GPT, prefixes: Sequence[str]) -> None:
    """Copy every parameter and buffer whose name begins with none of these."""
    theirs = tensors_of(old)
    for name, tensor in tensors_of(new).items():
        if not name.startswith(tuple(prefixes)):
            tensor.copy_(theirs[name])
