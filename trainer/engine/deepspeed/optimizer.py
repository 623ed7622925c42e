"""AdamW for ZeRO, by torch or by DeepSpeed's kernels, and access to their different states."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.distributed.mesh import Mesh
from trainer.engine.deepspeed.start import expert_group_name
from trainer.errors import ConfigError, first_line
from trainer.models.parameter_roles import is_decayed
from trainer.optim.create import MOMENTS, RATE_FACTOR
from trainer.optim.registry import OptimConfig


def parameter_groups(
    optim: OptimConfig,
    parameters: Mapping[str, nn.Parameter],
    experts: Collection[str],
    factors: Mapping[str, float],
    mesh: Mesh,
) -> list[dict[str, Any]]:
    """Group parameters as DeepSpeed requires: experts separately, and every group named."""
    members: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        members.setdefault((name in experts, is_decayed(name, parameter), factors[name]), []).append(parameter)
    return [
        {
            "params": group,
            "weight_decay": optim.weight_decay if decays else 0.0,
            "name": expert_group_name(mesh) if is_expert else f"dense, {decays=}, rate times {factor}",
            "moe": is_expert,
            RATE_FACTOR: factor,
        }
        for (is_expert, decays, factor), group in members.items()
    ]


def build_optimizer(
    deepspeed: Any,
    groups: list[dict[str, Any]],
    optim: OptimConfig,
    *,
    adam: str,
    config: Mapping[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    """Create the optimizer.

    Raises:
        ConfigError: if DeepSpeed's kernel is requested and cannot be built.
    """
    from deepspeed.git_version_info import installed_ops

    options: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps}
    offloads = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    kernel = "cpu_adam" if offloads or device.type == "cpu" else "fused_adam"
    if adam == "torch" or (adam == "auto" and not installed_ops.get(kernel)):
        return torch.optim.AdamW(groups, **options, fused=True)
    try:
        if kernel == "cpu_adam":
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
        return deepspeed.ops.adam.FusedAdam(groups, **options, adam_w_mode=True)
    except Exception as error:  # any failure of the compiler, or its absence
        cause = error.__cause__ or error
        raise ConfigError(
            f"engine.adam: DeepSpeed's {kernel} cannot be built: {first_line(cause):.200}; use torch"
        ) from error


def moments_of(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Return the moments of a partition, created as the optimizer does if there was no step yet."""
    state = optimizer.state[flat]
    if not state:
        state |= {key: torch.zeros_like(flat.detach()) for key in MOMENTS}
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        else:
            state["step"] = 0
    return {key: state[key] for key in MOMENTS}


def set_steps(optimizer: torch.optim.Optimizer, flat: Tensor, steps: int) -> None:
    """Set the step count of the moments of a partition."""
    state = optimizer.state[flat]
    state["step"] = state["step"].fill_(steps) if isinstance(state["step"], Tensor) else steps
