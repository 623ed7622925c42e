"""Low-rank adapters of a model's matrices: W + s B A, of which only A and B learn (LoRA, arXiv 2106.09685).

# r rank, N rows and K columns of a matrix.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.lora_config import LoRAConfig
from trainer.models.parameter_patterns import check_selection, selected
from trainer.models.parameter_roles import is_adapter
from trainer.models.projections import Projection
from trainer.moe.experts import Experts
from trainer.ops.compute_dtype import compute_dtype


class LoRALinear(nn.Linear):
    """Linear projection with an adapter: x W^T + s (x A^T) B^T."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        """Take over the weight and bias of a projection."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.uniform_(self.lora_a, -(base.in_features**-0.5), base.in_features**-0.5)

    @property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """Factors A (r, K) and B (N, r)."""
        return self.lora_a, self.lora_b

    def forward(self, input: Tensor) -> Tensor:
        """Apply to x (..., K): (..., N)."""
        x = input.to(compute_dtype(input))  # rounded once, so that one copy is saved
        return super().forward(x) + self.added(x)

    def added(self, x: Tensor) -> Tensor:
        """Return what the adapter adds for x (..., K): (..., N)."""
        return F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)


def product(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return x W^T, with the adapter of a projection but without its bias."""
    out = F.linear(x, linear.weight)
    return out + linear.added(x.to(compute_dtype(x))) if isinstance(linear, LoRALinear) else out


def whole_weight(linear: nn.Linear) -> Tensor:
    """Return the matrix (N, K) that a projection multiplies by, with its adapter."""
    if not isinstance(linear, LoRALinear):
        return linear.weight
    return torch.addmm(linear.weight, linear.lora_b, linear.lora_a, alpha=linear.scale)


def add_adapters(model: nn.Module, config: LoRAConfig, projections: Iterable[Projection]) -> None:
    """Give the projections of a model their adapters, in place, and freeze all weights but these and `trains`.

    Raises:
        ConfigError: if an entry of `trains` selects nothing.
    """
    for each in projections:
        for block in cast(Iterable[nn.Module], model.get_submodule("blocks")):
            module = _network(block, each.group)
            if isinstance(module, Experts):
                module.add_adapter(each.name, config.rank, config.scale)
            elif module is not None:
                base = cast(nn.Linear, module.get_submodule(each.name))
                module.add_module(each.name, LoRALinear(base, config.rank, config.scale))
    names = [name for name, _ in model.named_parameters()]
    check_selection("model.lora.trains", config.trains, names, is_tied="head.weight" not in names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or selected(config.trains, name))


def _network(block: nn.Module, group: str) -> nn.Module | None:
    """Return the part of a block that has a group's projections; None if this block has none."""
    if group == "attention":
        return block.get_submodule("attention")
    ffn = block.get_submodule("ffn")
    is_moe = hasattr(ffn, "experts")
    if group == "dense":
        return None if is_moe else ffn
    return getattr(ffn, group, None) if is_moe else None
