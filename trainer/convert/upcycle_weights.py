"""Fill the weights of an upcycled model. Every value is a function of the dense weights, the seed and the expert.

# E experts, F hidden units of an expert, D d_model, G granularity.
"""

from typing import cast

import torch
from torch import Tensor

from trainer.convert.hidden_units import HiddenUnits
from trainer.convert.router_columns import expert_dimensions, tensors_of
from trainer.convert.upcycle_plan import UpcyclePlan
from trainer.models.feed_forward import FeedForward, SharedExperts
from trainer.models.gpt import GPT
from trainer.moe.layer import MoE
from trainer.ops.noise import stable_hash


@torch.no_grad()
def upcycle_weights(dense: GPT, model: GPT, plan: UpcyclePlan, *, seed: int) -> None:
    """Fill `model`, which has the initial values of its config, with the weights of a dense model."""
    theirs = tensors_of(dense)
    kept = {f"blocks.{layer}.ffn." for layer in model.config.moe_layers}
    for name, tensor in tensors_of(model).items():
        if not name.startswith(tuple(kept)):
            tensor.copy_(theirs[name])
    for layer in model.config.moe_layers:
        units = HiddenUnits.of_layer(cast(FeedForward, dense.blocks[layer].ffn))
        _fill_layer(units, cast(MoE, model.blocks[layer].ffn), plan, seed=seed, layer=layer)
        _fill_router(model, layer, plan)


def _fill_layer(dense: HiddenUnits, moe: MoE, plan: UpcyclePlan, *, seed: int, layer: int) -> None:
    first, end = plan.routed_units
    size, options = (end - first) // plan.granularity, plan.options
    for e in range(moe.experts.num_experts):
        start = first + e % plan.granularity * size  # the experts of a copy are neighbours
        units = dense.take(torch.arange(start, start + size))
        units = units.scaled(plan.factor) if options.scale == "output" else units.spread(plan.factor)
        if options.drop_fraction:
            units = _with_new_units(units, options.drop_fraction, _generator("drop", seed, layer, e))
        if options.noise:
            units = units.noisy(options.noise, _generator("noise", seed, layer, e))
        units.copy_to(HiddenUnits.of_expert(moe.experts, e))
    if moe.shared is not None:
        shared = cast(SharedExperts, moe.shared)
        if shared.gate is not None:
            shared.gate.weight.zero_()
        units = dense.take(torch.arange(plan.shared_units) % len(dense))
        units.scaled(plan.shared_factor).copy_to(HiddenUnits.of_layer(shared))


def _fill_router(model: GPT, layer: int, plan: UpcyclePlan) -> None:
    """Repeat the router's initial columns for the experts of each copy, so that these are chosen together."""
    router, std = cast(MoE, model.blocks[layer].ffn).router, plan.options.router_std
    expert = torch.arange(cast(MoE, model.blocks[layer].ffn).experts.num_experts)
    dimensions = expert_dimensions(model.config, layer)
    for name, tensor in tensors_of(router).items():
        if std is not None and tensor.dim() > 1 and tensor.is_floating_point():
            tensor.mul_(std / model.config.init_std)
        if name in dimensions:
            rows = torch.arange(tensor.shape[dimensions[name]])
            rows[: len(expert)] = expert - expert % plan.granularity
            tensor.copy_(tensor.index_select(dimensions[name], rows.to(tensor.device)))


def _with_new_units(units: HiddenUnits, fraction: float, generator: torch.Generator) -> HiddenUnits:
    """Draw a fraction of the units anew, from normal distributions with mean and deviation of those they replace.

    Source: Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261), for each matrix apart.
    """
    chosen = torch.randperm(len(units), generator=generator)[: int(fraction * len(units))]
    if not len(chosen):
        return units
    old = units.take(chosen)
    w_in, w_out = units.w_in.clone(), units.w_out.clone()
    for part, weight in enumerate(old.w_in.unflatten(0, (units.parts, -1)).unbind(0)):
        w_in[chosen + part * len(units)] = _alike(weight, generator)
    w_out[:, chosen] = _alike(old.w_out, generator)
    return HiddenUnits(w_in, w_out)


def _alike(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a matrix with the mean and standard deviation of another one, on the CPU, as initial weights are."""
    drawn = torch.randn(weight.shape, generator=generator)
    return (drawn * weight.std(correction=0).cpu() + weight.mean().cpu()).to(weight)


def _generator(what: str, seed: int, layer: int, expert: int) -> torch.Generator:
    return torch.Generator().manual_seed(stable_hash("upcycle", what, seed, layer, expert))
