"""Configs of token-choice routers, which route every token independently. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from trainer.config.base import Problem, divisors
from trainer.config.numbers import Coefficient, Experts, Width
from trainer.moe.routers.config.options import JitterOptions, RouterOptions, Score, TopKOptions

if TYPE_CHECKING:
    from trainer.moe.routing import Router


class TopKRouterConfig(TopKOptions):
    """Token choice: every token selects its k best experts (Shazeer et al. 2017, arXiv 1701.06538)."""

    kind: Literal["top_k"] = "top_k"
    score: Score = "softmax"
    """Function from logits to scores: over all experts (softmax), or per expert (sigmoid)."""
    gate_bias: bool = False
    """Add a learned bias to the logits (GPT-OSS); it is in the scores, unlike the selection bias of other routers."""


class SwitchRouterConfig(TopKOptions):
    """Switch Transformer's router: one expert, weighted by its raw probability, with jitter (arXiv 2101.03961)."""

    kind: Literal["switch"] = "switch"
    top_k: Experts = 1
    """Experts per token, k."""
    normalize: bool = False
    """Divide the k combine weights by their sum. False keeps the raw scores."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Multiply the gate's input by uniform noise from [1 - jitter, 1 + jitter] in training."""


class GShardRouterConfig(TopKOptions):
    """GShard's router: two experts, the second kept at random by its weight in training (arXiv 2006.16668)."""

    kind: Literal["gshard"] = "gshard"
    random_second: bool = True
    """In training, keep each choice after the first with probability min(1, k * weight)."""

    def problems(self) -> Iterator[Problem]:
        """Refuse an option that has no effect."""
        yield from super().problems()
        if self.random_second and max(most for _, most in self.top_k_limits()) == 1:
            yield Problem("random_second", "true has no effect without a second expert; use false")

    def is_always_even(self, num_experts: int) -> bool:
        """Return whether every token takes all experts and drops none at random."""
        return super().is_always_even(num_experts) and not self.random_second

    @property
    def weight_sum(self) -> float | None:
        """The scale, if weights are normalized and no choice is dropped at random."""
        return None if self.random_second else super().weight_sum

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.gshard import GShardRouter

        return GShardRouter(d_model=d_model, num_experts=num_experts, layer=layer, **self.arguments())


class NoisyTopKRouterConfig(TopKOptions):
    """Top-k of noisy logits, with a learned noise scale (Shazeer et al. 2017, arXiv 1701.06538)."""

    estimates_load: ClassVar[bool] = True
    kind: Literal["noisy_top_k"] = "noisy_top_k"

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.noisy_top_k import NoisyTopKRouter

        return NoisyTopKRouter(d_model=d_model, num_experts=num_experts, layer=layer, **self.arguments())


class CosineRouterConfig(TopKOptions):
    """Top-k by the cosine between a projected token and each expert's direction (X-MoE, arXiv 2204.09179)."""

    kind: Literal["cosine"] = "cosine"
    d_proj: Width = 64
    """Width of the projected tokens."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.cosine import CosineRouter

        return CosineRouter(d_model=d_model, num_experts=num_experts, layer=layer, **self.arguments())


class BiasBalancedRouterConfig(TopKOptions):
    """Top-k with a selection bias that balances the load without an auxiliary loss (arXiv 2408.15664)."""

    kind: Literal["bias_balanced"] = "bias_balanced"
    score: Score = "sigmoid"
    """Function from logits to scores: over all experts (softmax), or per expert (sigmoid)."""
    bias_update_rate: Coefficient = 0.001
    """Gamma: change of an expert's bias per optimizer step."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.bias_balanced import BiasBalancedRouter

        return BiasBalancedRouter(d_model=d_model, num_experts=num_experts, layer=layer, **self.arguments())


class GroupLimitedRouterConfig(TopKOptions):
    """Top-k within a token's best expert groups, which limits the nodes it is sent to (DeepSeek-V2 and V3)."""

    kind: Literal["group_limited"] = "group_limited"
    score: Score = "sigmoid"
    """Function from logits to scores: over all experts (softmax), or per expert (sigmoid)."""
    bias_update_rate: Coefficient = 0.0
    """Update rate of the bias as in `bias_balanced`; 0: no bias."""
    groups: Experts = 4
    """Number of equal groups of consecutive experts."""
    groups_kept: Experts = 2
    """Groups that a token's experts are selected from."""
    group_score: Literal["best_two", "best"] = "best_two"
    """Score of a group for a token: the sum of its two best scores (V3, 2412.19437) or the best (V2, 2405.04434)."""

    def problems_among(self, num_experts: int) -> Iterator[Problem]:
        """Check the groups against the number of experts and k."""
        if num_experts % self.groups:
            what = f"{self.groups} does not divide num_experts {num_experts}"
            yield Problem("groups", f"{what}; use one of {divisors(num_experts, near=self.groups)}")
            return
        if self.groups_kept > self.groups:
            yield Problem(
                "groups_kept", f"{self.groups_kept} is more than groups {self.groups}; use 1 to {self.groups}"
            )
        within = self.groups_kept * num_experts // self.groups + self.null_experts
        for key, most in self.top_k_limits():
            if most > within:
                yield Problem(
                    key, f"{most} is more than the {within} experts of groups_kept {self.groups_kept}; keep more groups"
                )

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.group_limited import GroupLimitedRouter

        return GroupLimitedRouter(d_model=d_model, num_experts=num_experts, layer=layer, **self.arguments())


class TopPRouterConfig(JitterOptions):
    """Top-p: the fewest experts whose probabilities add up to p (Huang et al. 2024, arXiv 2403.07652)."""

    why_no_capacity: ClassVar[str] = (
        "the number of experts per token varies under top_p, so a capacity cannot be computed in advance"
    )
    kind: Literal["top_p"] = "top_p"
    p: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Probability mass: a token takes its most probable experts until their probabilities add up to p."""
    max_experts: Experts | None = None
    """Maximum experts per token. Null: all."""
    normalize: bool = False
    """Divide a token's combine weights by their sum. False keeps the probabilities, which have a gradient for k = 1."""
    sparsity_coef: Coefficient = 1e-4
    """Weight of the sparsity loss, the entropy of the probabilities: the lower, the fewer experts a token needs."""

    @property
    def has_static_flops(self) -> bool:
        """False: the number of experts varies by token."""
        return False

    @property
    def weight_sum(self) -> float | None:
        """1 if weights are normalized."""
        return 1.0 if self.normalize else None

    def experts_per_token(self, num_experts: int) -> float:
        """Return the maximum number of experts per token."""
        return self.most_experts(num_experts)

    def most_experts(self, num_experts: int) -> int:
        """Return `max_experts`, or all."""
        return min(num_experts, self.max_experts or num_experts)

    def problems_among(self, num_experts: int) -> Iterator[Problem]:
        """Refuse a limit without effect, and a router that gets no gradient."""
        if self.max_experts is not None and self.max_experts > num_experts:
            yield Problem("max_experts", f"{self.max_experts} is more than num_experts {num_experts}; remove it")
        if self.max_experts == 1 and self.normalize:
            yield Problem("normalize", "true with max_experts 1 makes every combine weight the constant 1; use false")

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.top_p import TopPRouter

        return TopPRouter(d_model=d_model, num_experts=num_experts, layer=layer, **self.arguments())


class DenseRouterConfig(RouterOptions):
    """Every expert for every token, weighted by the softmax of the scores: y = sum_i g_i(x) e_i(x)."""

    why_no_capacity: ClassVar[str] = "the dense router sends every token to every expert"
    kind: Literal["dense"] = "dense"

    def is_always_even(self, num_experts: int) -> bool:
        """Return True."""
        return True

    @property
    def weight_sum(self) -> float | None:
        """1."""
        return 1.0

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.dense import DenseRouter

        return DenseRouter(d_model=d_model, num_experts=num_experts)
