"""AdamW with weight decay by parameter group."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

Parameters = Iterable[nn.Parameter]


def build_adamw(
    *, decayed: Parameters, not_decayed: Parameters, weight_decay: float, betas: tuple[float, float], eps: float
) -> Optimizer:
    """Create the optimizer; the learning rate is set before every step.

    Sharded weights are in separate groups: torch's fused update does not mix kinds of tensors.
    """
    groups = [
        {"params": [p for p in parameters if isinstance(p, DTensor) == is_sharded], "weight_decay": decay}
        for parameters, decay in ((list(decayed), weight_decay), (list(not_decayed), 0.0))
        for is_sharded in (False, True)
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
