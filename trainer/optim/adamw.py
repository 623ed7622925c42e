"""AdamW over parameters grouped by what they are for."""

from collections.abc import Iterable

import torch
from torch import nn

from trainer.optim.registry import AdamWConfig


def build_adamw(
    config: AdamWConfig, *, decayed: Iterable[nn.Parameter], not_decayed: Iterable[nn.Parameter]
) -> torch.optim.AdamW:
    """Make the optimizer; its learning rate is set before every step.

    Which parameters decay goes by their role and not by their number of dimensions:
    stacked expert biases would have two.
    """
    groups = [
        {"params": list(decayed), "weight_decay": config.weight_decay},
        {"params": list(not_decayed), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=config.betas, eps=config.eps, fused=True
    )
