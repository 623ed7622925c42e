"""Parameters and floating-point operations of a model, counted from its modules.

# S tokens in a row, E experts, V vocabulary, D d_model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from trainer.models.block import Block
from trainer.models.gpt import GPT
from trainer.models.lora import LoRALinear
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

    learning_parameters: int
    """Parameters that are not frozen."""
    backward_flops_per_token: int
    """The same of the backward pass, without what is recomputed: a product for the gradient of its input, if something
    before it learns, and one for that of its weight, if it learns."""

    @property
    def training_flops_per_token(self) -> int:
        """FLOPs of forward and backward: three times the forward's, if everything learns."""
        return self.forward_flops_per_token + self.backward_flops_per_token


def model_size(model: GPT, *, top_k: int | None = None) -> ModelSize:
    """Count parameters and FLOPs of a model, which may be on the meta device.

    `top_k` overrides the experts per token of the config, for routers with this option.
    """
    moe = model.config.moe
    if moe is not None and top_k is not None:
        moe = moe.model_copy(update={"router": moe.router.model_copy(update={"top_k": top_k})})
    share = 1.0 if moe is None else moe.experts_per_token / moe.num_experts
    experts = [sum(p.numel() for p in module.parameters()) for module in model.modules() if isinstance(module, Experts)]
    idle = sum(size - round(size * share) for size in experts)
    counted, total = _Products(share), sum(p.numel() for p in model.parameters())
    counted.visit(model.embedding)
    for block, window in zip(cast(Iterable[Block], model.blocks), model.config.windows, strict=True):
        counted.visit(block.attention_norm)
        pairs = model.config.num_heads * min(window or model.config.seq_len, model.config.seq_len)
        for name, module in block.attention.named_children():
            if name == "out":
                counted.add_scores(2 * pairs * sum(model.config.head_widths))
            counted.visit(module)
        counted.visit(block.ffn_norm)
        counted.visit(block.ffn)
    counted.visit(model.norm)
    if model.head is None:
        counted.add(2 * model.embedding.weight.numel(), learns=model.embedding.weight.requires_grad)
    else:
        counted.visit(model.head)
    return ModelSize(
        total_parameters=total,
        active_parameters=total - idle,
        forward_flops_per_token=counted.forward,
        learning_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        backward_flops_per_token=counted.backward,
    )


class _Products:
    """Sums of FLOPs over the products of a model, in the order of the forward pass."""

    def __init__(self, share: float) -> None:
        """Start; a token visits this share of the experts."""
        self.share, self.forward, self.backward = share, 0, 0
        self._has_gradient = False
        """Something before the next product learns, so that its input has a gradient."""

    def add(self, flops: int, *, learns: bool, has_gradient: bool = False) -> None:
        """Add a product with a weight."""
        self.forward += flops
        self.backward += flops * ((self._has_gradient or has_gradient) + learns)

    def add_scores(self, flops: int) -> None:
        """Add products of attention, both factors of which have a gradient."""
        self.forward += flops
        self.backward += 2 * flops * self._has_gradient

    def visit(self, module: nn.Module) -> None:
        """Add the products of a module's linear projections and experts; additions of biases are few."""
        for inner in module.modules():
            if isinstance(inner, Experts):
                for weight, adapter in inner.matrices():
                    self._add_matrix(weight, adapter, self.share)
            elif isinstance(inner, LoRALinear):
                self._add_matrix(inner.weight, inner.adapter, 1.0)
            elif isinstance(inner, nn.Linear):
                self._add_matrix(inner.weight, None, 1.0)
            self._has_gradient |= any(p.requires_grad for p in inner.parameters(recurse=False))

    def _add_matrix(self, weight: Tensor, adapter: tuple[Tensor, Tensor] | None, share: float) -> None:
        a, b = adapter or (None, None)
        for factor, has_gradient in ((weight, False), (a, False), (b, a is not None and a.requires_grad)):
            if factor is not None:
                flops = 2 * round(factor.numel() * share)
                self.add(flops, learns=factor.requires_grad, has_gradient=has_gradient)
        self._has_gradient |= any(factor is not None and factor.requires_grad for factor in (weight, a, b))
