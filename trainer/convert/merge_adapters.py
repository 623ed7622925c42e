"""Merge adapters: fill a model without them with W + s B A, one tensor at a time."""

import torch
from torch import Tensor

from trainer.convert.router_columns import tensors_of
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import factor_names


@torch.no_grad()
def merge_adapters(old: GPT, new: GPT) -> list[str]:
    """Fill `new`, of the same config without adapters, from `old`; return what was done."""
    assert old.config.lora is not None, "surgery_plan.py refuses runs without adapters"
    given, merged = tensors_of(old), 0
    for name, tensor in tensors_of(new).items():
        factors = [given[factor] for factor in factor_names(name) if factor in given]
        tensor.copy_(
            merged_weight(given[name], factors[0], factors[1], old.config.lora.scale) if factors else given[name]
        )
        merged += bool(factors)
    return [f"merged the adapters of {merged} weights, of rank {old.config.lora.rank}"]


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return W + s B A, of one matrix or of the experts' stacked ones, rounded once."""
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)
