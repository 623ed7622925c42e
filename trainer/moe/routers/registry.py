"""Every router's options, and the union of them that `model.moe.router` accepts. Imports no torch.

To add a router: one implementation file beside this one, one config class here, one name in `RouterConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from trainer.config.base import Config, Problem

if TYPE_CHECKING:
    from trainer.moe.routing import Router


class TopKOptions(Config):
    """What every router that keeps the k best-scored experts of a token has in common."""

    top_k: PositiveInt = 2
    """Experts per token, k."""
    normalize: bool = True
    """Divide the k combine weights by their sum. False keeps the raw scores."""
    scale: PositiveFloat = 1.0
    """Factor on the combine weights, after normalisation (DeepSeek's routed scaling factor)."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Multiply what the gate reads by uniform noise from [1 - jitter, 1 + jitter] while training."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a router that the language-model loss could never train."""
        if self.top_k == 1 and self.normalize:
            yield Problem(
                "normalize",
                "true with top_k 1 makes every combine weight the constant 1, so the router gets no gradient; "
                "set normalize: false, or top_k: 2 or more",
            )


class TopKRouterConfig(TopKOptions):
    """Token choice: every token goes to its k best experts (Shazeer et al. 2017, arXiv 1701.06538)."""

    kind: Literal["top_k"] = "top_k"
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores: over all experts together, or each expert by itself."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.top_k import TopKRouter

        return TopKRouter(self, d_model=d_model, num_experts=num_experts, layer=layer)


class BiasBalancedRouterConfig(TopKOptions):
    """Top-k with a selection bias that evens out the load without a loss term (arXiv 2408.15664)."""

    kind: Literal["bias_balanced"] = "bias_balanced"
    score: Literal["softmax", "sigmoid"] = "sigmoid"
    """How logits become scores: over all experts together, or each expert by itself."""
    bias_update_rate: NonNegativeFloat = 0.001
    """Gamma: what the bias of an expert moves by in one optimizer step."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.bias_balanced import BiasBalancedRouter

        return BiasBalancedRouter(self, d_model=d_model, num_experts=num_experts, layer=layer)


class DenseRouterConfig(Config):
    """Every expert for every token, weighted by the softmax of the scores: y = sum_i g_i(x) e_i(x)."""

    kind: Literal["dense"] = "dense"

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.dense import DenseRouter

        return DenseRouter(d_model=d_model, num_experts=num_experts)


class RoundRobinRouterConfig(Config):
    """Experts in turn by position, with equal weights: perfect balance, nothing learned. For benchmarks."""

    kind: Literal["round_robin"] = "round_robin"
    top_k: PositiveInt = 2
    """Experts per token, k."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.round_robin import RoundRobinRouter

        return RoundRobinRouter(self, num_experts=num_experts)


RouterConfig = Annotated[
    TopKRouterConfig | BiasBalancedRouterConfig | DenseRouterConfig | RoundRobinRouterConfig,
    Field(discriminator="kind"),
]
