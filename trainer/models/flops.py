"""Parameters and floating-point operations of a model, counted from its modules and not from a list of names.

# S tokens in a row, E experts, V vocabulary, D d_model.
"""

from dataclasses import dataclass

from torch import nn

from trainer.models.gpt import GPT, Attention
from trainer.moe.experts import Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Size of a model, and FLOPs of a token."""

    total_parameters: int
    active_parameters: int
    """Parameters that one token meets: those of its experts, everything else whole (the embedding included)."""
    forward_flops_per_token: int
    """Multiplications and additions in matrix products; attention scores all S x S pairs, as torch's counter does."""

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward: the backward has two products for each one of the forward."""
        return 3 * self.forward_flops_per_token


def model_size(model: GPT, *, top_k: int | None = None) -> ModelSize:
    """Count a model; it may be on the meta device.

    Args:
        model: what to count.
        top_k: experts per token instead of the configured number, for a router with this option.
    """
    moe = model.config.moe
    if moe is not None and top_k is not None:
        moe = moe.model_copy(update={"router": moe.router.model_copy(update={"top_k": top_k})})
    total = sum(p.numel() for p in model.parameters())
    idle = flops = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            flops += 2 * module.weight.numel()
        elif isinstance(module, Attention):
            flops += 4 * model.config.seq_len * module.num_heads * module.head_dim  # scores, and their sum of values
        elif isinstance(module, Experts):
            assert moe is not None, "a model with experts has a moe section"
            weights = module.w_in.numel() + module.w_out.numel()
            active = round(weights * moe.experts_per_token / moe.num_experts)
            idle += weights - active
            flops += 2 * active
    if model.head is None:
        flops += 2 * model.embedding.weight.numel()
    return ModelSize(total_parameters=total, active_parameters=total - idle, forward_flops_per_token=flops)
