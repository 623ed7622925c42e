"""Configs of the routers by which every token takes its own best experts, whatever others take. Imports no torch."""

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
    """Token choice: every token goes to its k best experts (Shazeer et al. 2017, arXiv 1701.06538)."""

    kind: Literal["top_k"] = "top_k"
    score: Score = "softmax"
    """Function from logits to scores: over all experts together, or for each expert by itself."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.top_k import TopKRouter

        return TopKRouter(score=self.score, **self.top_k_arguments(d_model, num_experts, layer))


class SwitchRouterConfig(TopKOptions):
    """Switch Transformer's router: one expert, its raw probability as weight, jitter (arXiv 2101.03961)."""

    kind: Literal["switch"] = "switch"
    top_k: Experts = 1
    """Experts per token, k."""
    normalize: bool = False
    """Divide the k combine weights by their sum. False keeps the raw scores."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Multiply what the gate reads by uniform noise from [1 - jitter, 1 + jitter] while training."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.top_k import TopKRouter

        return TopKRouter(**self.top_k_arguments(d_model, num_experts, layer))


class GShardRouterConfig(TopKOptions):
    """GShard's router: two experts, the second one drawn by its weight while training (arXiv 2006.16668)."""

    kind: Literal["gshard"] = "gshard"
    random_second: bool = True
    """While training, keep a token's later choices only with probability min(1, k * weight)."""

    def problems(self) -> Iterator[Problem]:
        """Refuse an option that could have no effect."""
        yield from super().problems()
        if self.random_second and max(most for _, most in self.most_wanted()) == 1:
            yield Problem("random_second", "true has no effect where no token has a second expert; use false")

    def is_always_even(self, num_experts: int) -> bool:
        """Tell whether every token takes every expert there is, and lets none go."""
        return super().is_always_even(num_experts) and not self.random_second

    @property
    def weight_sum(self) -> float | None:
        """The scale, if weights are normalised and none is let go."""
        return None if self.random_second else super().weight_sum

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.gshard import GShardRouter

        return GShardRouter(random_second=self.random_second, **self.top_k_arguments(d_model, num_experts, layer))


class NoisyTopKRouterConfig(TopKOptions):
    """Top-k of logits plus noise, whose size per expert and token is learned (Shazeer et al. 2017, 1701.06538)."""

    estimates_load: ClassVar[bool] = True
    kind: Literal["noisy_top_k"] = "noisy_top_k"

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.noisy_top_k import NoisyTopKRouter

        return NoisyTopKRouter(**self.top_k_arguments(d_model, num_experts, layer))


class CosineRouterConfig(TopKOptions):
    """Top-k by the angle between a projected token and each expert's direction (X-MoE, arXiv 2204.09179)."""

    kind: Literal["cosine"] = "cosine"
    d_proj: Width = 64
    """Width that tokens are projected to."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.cosine import CosineRouter

        return CosineRouter(d_proj=self.d_proj, **self.top_k_arguments(d_model, num_experts, layer))


class BiasBalancedRouterConfig(TopKOptions):
    """Top-k with a selection bias that evens out the load without a loss term (arXiv 2408.15664)."""

    kind: Literal["bias_balanced"] = "bias_balanced"
    score: Score = "sigmoid"
    """Function from logits to scores: over all experts together, or for each expert by itself."""
    bias_update_rate: Coefficient = 0.001
    """Gamma: what the bias of an expert moves by in one optimizer step."""

    @property
    def is_self_balancing(self) -> bool:
        """True if its bias is updated."""
        return self.bias_update_rate > 0

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.bias_balanced import BiasBalancedRouter

        return BiasBalancedRouter(
            score=self.score,
            bias_update_rate=self.bias_update_rate,
            **self.top_k_arguments(d_model, num_experts, layer),
        )


class GroupLimitedRouterConfig(TopKOptions):
    """Top-k within a token's best groups of experts, so that it visits few nodes (DeepSeek-V2 and V3)."""

    kind: Literal["group_limited"] = "group_limited"
    score: Score = "sigmoid"
    """Function from logits to scores: over all experts together, or for each expert by itself."""
    bias_update_rate: Coefficient = 0.0
    """Update rate of the bias as in `bias_balanced`; 0: no bias."""
    groups: Experts = 4
    """Equal neighbouring parts that the experts are cut into."""
    groups_kept: Experts = 2
    """Groups that a token's experts may be in."""
    group_score: Literal["best_two", "best"] = "best_two"
    """Score of a group for a token: the sum of its two best scores (V3, 2412.19437) or the best (V2, 2405.04434)."""

    @property
    def is_self_balancing(self) -> bool:
        """True if it has a bias."""
        return self.bias_update_rate > 0

    def problems_among(self, num_experts: int) -> Iterator[Problem]:
        """Refuse groups that cannot be."""
        if num_experts % self.groups:
            yield Problem(
                "groups",
                f"{self.groups} does not divide num_experts {num_experts}; "
                f"use one of {divisors(num_experts, near=self.groups)}",
            )
            return
        if self.groups_kept > self.groups:
            yield Problem(
                "groups_kept", f"{self.groups_kept} is more than groups {self.groups}; use 1 to {self.groups}"
            )
        within = self.groups_kept * num_experts // self.groups + self.null_experts
        for key, most in self.most_wanted():
            if most > within:
                yield Problem(
                    key, f"{most} is more than the {within} experts of groups_kept {self.groups_kept}; keep more groups"
                )

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.group_limited import GroupLimitedRouter

        return GroupLimitedRouter(
            score=self.score,
            bias_update_rate=self.bias_update_rate,
            groups=self.groups,
            groups_kept=self.groups_kept,
            group_score=self.group_score,
            **self.top_k_arguments(d_model, num_experts, layer),
        )


class TopPRouterConfig(JitterOptions):
    """Top-p: the fewest experts that hold the probability p (Huang et al. 2024, arXiv 2403.07652)."""

    why_no_capacity: ClassVar[str] = (
        "how many experts tokens take under top_p is not known before, so no room can be sized by it"
    )
    kind: Literal["top_p"] = "top_p"
    p: Annotated[float, Field(gt=0, le=1)] = 0.4
    """A token takes its likeliest experts until their probabilities add up to this."""
    max_experts: Experts | None = None
    """Most experts per token; null: all of them."""
    normalize: bool = False
    """Divide a token's combine weights by their sum. False keeps the probabilities, which a lone expert learns by."""
    sparsity_coef: Coefficient = 1e-4
    """Weight of the sparsity loss: the entropy of the probabilities, which few experts hold when it is small."""

    @property
    def has_static_flops(self) -> bool:
        """Every token has its own number."""
        return False

    @property
    def weight_sum(self) -> float | None:
        """1, if weights are normalised."""
        return 1.0 if self.normalize else None

    def experts_per_token(self, num_experts: int) -> float:
        """Return the most experts that a token can take."""
        return self.most_experts(num_experts)

    def most_experts(self, num_experts: int) -> int:
        """Return the limit, or all."""
        return min(num_experts, self.max_experts or num_experts)

    def problems_among(self, num_experts: int) -> Iterator[Problem]:
        """Refuse a limit that is none, and a router that is never trained."""
        if self.max_experts is not None and self.max_experts > num_experts:
            yield Problem("max_experts", f"{self.max_experts} is more than num_experts {num_experts}; remove it")
        if self.max_experts == 1 and self.normalize:
            yield Problem("normalize", "true with max_experts 1 makes every combine weight the constant 1; use false")

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.top_p import TopPRouter

        return TopPRouter(
            d_model=d_model,
            num_experts=num_experts,
            layer=layer,
            p=self.p,
            max_experts=self.max_experts,
            normalize=self.normalize,
            sparsity_coef=self.sparsity_coef,
            jitter=self.jitter,
        )


class DenseRouterConfig(RouterOptions):
    """Every expert for every token, weighted by the softmax of the scores: y = sum_i g_i(x) e_i(x)."""

    why_no_capacity: ClassVar[str] = "the dense router sends every token to every expert"
    kind: Literal["dense"] = "dense"

    def is_always_even(self, num_experts: int) -> bool:
        """Return true."""
        return True

    @property
    def weight_sum(self) -> float | None:
        """Return 1."""
        return 1.0

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.dense import DenseRouter

        return DenseRouter(d_model=d_model, num_experts=num_experts)
