"""Initial weights: every tensor is a function of the seed, its name and the global expert id, never of a rank."""

import torch
from torch import Tensor

from trainer.models.gpt import GPT
from trainer.models.parameter_roles import initial_std, is_matrix, parameter_role
from trainer.moe.experts import Experts
from trainer.moe.routing import Router
from trainer.ops.noise import stable_hash

# E experts.


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Fill every parameter and buffer of a model on its device.

    Expert e of a stacked (E, ...) weight has a random stream of its own, so that the same experts start from the same
    weights wherever they live. What is no matrix is not drawn: norms are 1, a router says what its own start from, and
    biases are 0.
    """
    first_expert, stated = expert_parameters(model), _stated_values(model)
    for name, parameter in model.named_parameters():
        std = initial_std(name, init_std=model.config.init_std, num_layers=model.config.num_layers)
        match parameter_role(name):
            case "norm":
                parameter.fill_(1.0)
            case _ if not is_matrix(name, parameter):
                parameter.fill_(stated.get(name, 0.0))
            case "expert":
                for i, weight in enumerate(parameter):
                    e = first_expert[name] + i
                    weight.copy_(_normal(weight, std, stable_hash("init", seed, name, e)))
            case _:
                parameter.copy_(_normal(parameter, std, stable_hash("init", seed, name)))
    for buffer in model.buffers():
        buffer.zero_()


def expert_parameters(model: GPT) -> dict[str, int]:
    """Return the names of all stacked (E_local, ...) weights, with the global number of their first expert."""
    return {
        f"{prefix}.{name}": module.first
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }


def _stated_values(model: GPT) -> dict[str, float]:
    """Return what routers say of their parameters that are no matrices."""
    return {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        if isinstance(module, Router)
        for name, value in module.initial_values.items()
    }


def _normal(like: Tensor, std: float, seed: int) -> Tensor:
    """Draw on the CPU in float32, so that every device and dtype starts from the same values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(like.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
