"""Feed-forward networks that every token visits: those of dense blocks, and shared experts.

# D d_model.
"""

from collections.abc import Callable

from torch import Tensor, nn

from trainer.models.config import ModelConfig, Recompute
from trainer.models.recompute import checkpointed
from trainer.ops.activations import Activation, hidden_width
from trainer.ops.expert_ffn import activate


class FeedForward(nn.Module):
    """Dense feed-forward network without biases."""

    def __init__(self, config: ModelConfig, d_ff: int) -> None:
        super().__init__()
        self.activation = config.activation_function
        self.w_in = nn.Linear(config.d_model, hidden_width(d_ff, self.activation), bias=False)
        self.w_out = nn.Linear(d_ff, config.d_model, bias=False)
        self.activate: Callable[[Tensor, Activation], Tensor] = activate
        self.recompute: Recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., D)."""
        return checkpointed(self._both, x, recompute=self.recompute == "block")

    def _both(self, x: Tensor) -> Tensor:
        return checkpointed(self._second, self.w_in(x), recompute=self.recompute == "norms_and_activations")

    def _second(self, h: Tensor) -> Tensor:
        return self.w_out(self.activate(h, self.activation))


class SharedExperts(FeedForward):
    """All shared experts of a layer as one network, with or without a gate: sigmoid(w x) FFN(x), as in Qwen2-MoE."""

    def __init__(self, config: ModelConfig, d_ff: int, *, has_gate: bool) -> None:
        super().__init__(config, d_ff)
        self.gate = nn.Linear(config.d_model, 1, bias=False) if has_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., D)."""
        y = super().forward(x)
        return y if self.gate is None else self.gate(x).sigmoid() * y
