"""AdamW with weight decay by parameter group."""

from collections.abc import Iterable
from inspect import unwrap

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.distributed.sharded_tensor import is_sharded

Parameters = Iterable[nn.Parameter]


class _AdamW(torch.optim.AdamW):
    """Torch's AdamW without the hooks for torch.compile, which import the compiler: a second of the start of a run."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
    add_param_group = unwrap(Optimizer.add_param_group)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)
    zero_grad = unwrap(Optimizer.zero_grad)


def build_adamw(
    *, decayed: Parameters, not_decayed: Parameters, weight_decay: float, betas: tuple[float, float], eps: float
) -> Optimizer:
    """Create the optimizer; the learning rate is set before every step.

    Sharded weights are in separate groups: torch's fused update does not mix kinds of tensors.
    """
    groups = [
        {"params": [p for p in parameters if is_sharded(p) == in_shards], "weight_decay": decay}
        for parameters, decay in ((list(decayed), weight_decay), (list(not_decayed), 0.0))
        for in_shards in (False, True)
    ]
    return _AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
