"""Feed-forward networks that every token visits: those of dense blocks, and shared experts.

# D d_model.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from trainer.models.config import ModelConfig, Recompute
from trainer.models.recompute import checkpointed
from trainer.models.token_exchange import TokenExchange, keep_cuts, project_in, project_out, with_adapters
from trainer.ops.activations import Activation, hidden_width
from trainer.ops.cut import Cut
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
        self.exchange: TokenExchange | None = None
        """Exchanges tokens with the ranks that have the other hidden units; None: all are here."""

    def cut_of_units(self, first: int, last: int) -> dict[str, Cut]:
        """Return the cuts of both matrices that belong to some of the d_ff hidden units."""
        d_ff, width = self.w_out.in_features, self.w_in.out_features
        rows = tuple((at + first, at + last) for at in range(0, width, d_ff))  # of the gate, and of what it multiplies
        cuts = {"w_in.weight": Cut(0, width, rows), "w_out.weight": Cut(1, d_ff, ((first, last),))}
        return with_adapters(self, cuts)

    def keep_units(self, first: int, last: int) -> None:
        """Keep only some of the hidden units."""
        keep_cuts(self, self.cut_of_units(first, last))

    def forward(self, x: Tensor, *, is_part: bool = False) -> Tensor:
        """Apply to x (..., D), a part of each row if `is_part`."""
        return checkpointed(partial(self._both, is_part=is_part), x, recompute=self.recompute == "block")

    def _both(self, x: Tensor, *, is_part: bool) -> Tensor:
        second, again = partial(self._second, is_part=is_part), self.recompute == "norms_and_activations"
        return checkpointed(second, project_in(self.w_in, x, self.exchange, is_part=is_part), recompute=again)

    def _second(self, h: Tensor, *, is_part: bool) -> Tensor:
        return project_out(self.w_out, self.activate(h, self.activation), self.exchange, is_part=is_part)


class SharedExperts(FeedForward):
    """All shared experts of a layer as one network, with or without a gate: sigmoid(w x) FFN(x), as in Qwen2-MoE."""

    def __init__(self, config: ModelConfig, d_ff: int, *, has_gate: bool) -> None:
        super().__init__(config, d_ff)
        self.gate = nn.Linear(config.d_model, 1, bias=False) if has_gate else None

    def forward(self, x: Tensor, *, is_part: bool = False) -> Tensor:
        """Apply to x (..., D)."""
        y = super().forward(x, is_part=is_part)
        return y if self.gate is None else self.gate(x).sigmoid() * y
