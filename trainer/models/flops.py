"""Parameters and floating-point operations of a model, counted from its modules.

# S tokens in a row, E experts, V vocabulary, D d_model.
"""

from dataclasses import dataclass

from torch import nn

from trainer.models.gpt import GPT
from trainer.moe.experts import Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters of a model, and FLOPs per token."""

    total_parameters: int
    active_parameters: int
    """Parameters used by one token: those of its experts, and all others (the embedding included)."""
    forward_flops_per_token: int
    """Multiplications and additions of matrix products; attention counts S keys for each query, like torch's counter,
    or those of a layer's window."""

    @property
    def training_flops_per_token(self) -> int:
        """FLOPs of forward and backward, without what is recomputed; the backward has two products for each of one."""
        return 3 * self.forward_flops_per_token


def model_size(model: GPT, *, top_k: int | None = None) -> ModelSize:
    """Count parameters and FLOPs of a model, which may be on the meta device.

    `top_k` overrides the experts per token of the config, for routers with this option.
    """
    moe = model.config.moe
    if moe is not None and top_k is not None:
        moe = moe.model_copy(update={"router": moe.router.model_copy(update={"top_k": top_k})})
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    pairs = sum(min(window or model.config.seq_len, model.config.seq_len) for window in model.config.windows)
    # Scores and weighted values.
    flops = 2 * pairs * model.config.num_heads * sum(model.config.head_widths)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            flops += 2 * module.weight.numel()
        elif isinstance(module, Experts):
            assert moe is not None, "a model with experts has a moe section"
            share = moe.experts_per_token / moe.num_experts
            weights = sum(p.numel() for p in module.parameters())
            idle += weights - round(weights * share)
            flops += 2 * round((module.w_in.numel() + module.w_out.numel()) * share)  # additions of biases are few
    if model.head is None:
        flops += 2 * model.embedding.weight.numel()
    return ModelSize(total_parameters=total, active_parameters=total - idle, forward_flops_per_token=flops)
