"""Create the optimizer of the native engine, built-in or a plug-in."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config.build_plugin import build_plugin, is_plugin
from trainer.errors import ConfigError
from trainer.optim.adamw import Parameters
from trainer.optim.registry import OptimizerOptions

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of a parameter that checkpoints hold, besides `step`."""
RATE_FACTOR = "lr_scale"
"""Key of an optimizer's group: factor of its learning rate."""


def create_optimizer(config: OptimizerOptions, *, decayed: Parameters, not_decayed: Parameters) -> Optimizer:
    """Create an optimizer; its learning rate is set before every step.

    Raises:
        ConfigError: if a plug-in cannot be built, or has state that checkpoints would lose.
    """
    if is_plugin(config):
        _check_state(config)
    return build_plugin(config, Optimizer, "optim", decayed=decayed, not_decayed=not_decayed)


def _check_state(config: OptimizerOptions) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = build_plugin(config, Optimizer, "optim", decayed=[weight], not_decayed=[])
    optimizer.step()
    if (found := set(optimizer.state[weight])) != {"step", *MOMENTS}:
        raise ConfigError(
            f"optim: {config.kind}: the state of a parameter has {', '.join(sorted(found)) or 'nothing'}; checkpoints "
            f"hold exactly step, {' and '.join(MOMENTS)}"
        )


def scale_rates(optimizer: Optimizer, factors: Mapping[Tensor, float]) -> None:
    """Split the groups of an optimizer, which has taken no step, so that each has one factor of the learning rate.

    A plug-in needs to know nothing of it: groups are torch's own, and the state is by parameter.
    """
    if all(factor == 1 for factor in factors.values()):
        return
    groups = []
    for group in optimizer.param_groups:
        members: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            members.setdefault(factors[parameter], []).append(parameter)
        groups += [{**group, "params": same, RATE_FACTOR: factor} for factor, same in members.items()]
    optimizer.param_groups[:] = groups


def set_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of a step: that of a group is `lr` times its factor."""
    for group in groups:
        group["lr"] = lr * group.get(RATE_FACTOR, 1.0)
