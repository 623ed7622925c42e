"""Create the optimizer of the native engine, built-in or a plug-in."""

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.config.build_plugin import build_plugin, is_plugin
from trainer.errors import ConfigError
from trainer.optim.adamw import Parameters
from trainer.optim.registry import OptimizerOptions

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of a parameter that checkpoints hold, besides `step`."""


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
