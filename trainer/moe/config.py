"""The `model.moe` section: router, experts, capacity and auxiliary losses. Imports no torch."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from trainer.config.base import Config, Problem, divisors
from trainer.config.numbers import Coefficient, Count, Experts, ExtraExperts, Whole, Width
from trainer.moe.layer_options import BalanceConfig, CapacityConfig, CvSquaredConfig, DeviceBalanceConfig
from trainer.moe.routers.config.token_choice import TopKRouterConfig
from trainer.moe.routers.registry import RouterConfig
from trainer.moe.terms import AuxLosses


class MoEConfig(Config):
    """Mixture-of-experts layers of the model."""

    first_dense_layers: Whole = 0
    """Number of leading layers that stay dense."""
    every: Count = 1
    """Interval of MoE layers among the remaining ones: with 2, the second, fourth and so on are MoE."""
    layers: Annotated[list[Whole], Field(min_length=1)] | None = None
    """Indices of the MoE layers, from 0, for patterns that the two keys above cannot express. Null: by those keys."""
    num_experts: Experts = 8
    """Routed experts, E."""
    d_ff: Width = 512
    """Hidden width of one expert, F."""
    expert_bias: bool = False
    """Add learned biases to both products of every routed expert (GPT-OSS)."""
    num_shared_experts: ExtraExperts = 0
    """Experts that process every token, with weight 1."""
    shared_d_ff: Width | None = None
    """Hidden width of all shared experts together. Null: num_shared_experts * d_ff."""
    shared_gate: bool = False
    """Multiply the output of the shared experts by the sigmoid of a learned linear function of the token (Qwen)."""
    router: RouterConfig = TopKRouterConfig()
    """Router, which selects each token's experts."""
    capacity: CapacityConfig = CapacityConfig()
    """Expert capacity."""
    balance: BalanceConfig = BalanceConfig()
    """Load-balancing loss."""
    cv_squared: CvSquaredConfig = CvSquaredConfig()
    """Importance and load losses."""
    device_balance: DeviceBalanceConfig = DeviceBalanceConfig()
    """Load-balancing loss over groups of experts."""
    diversity_coef: Coefficient = 0.0
    """Weight of the mean squared cosine between the outputs of a token's experts, which is 0 if they are orthogonal."""
    z_loss_coef: Coefficient = 0.001
    """Weight of the mean squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906). 0 turns it off."""

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together; 0 without any."""
        return (self.shared_d_ff or self.d_ff * self.num_shared_experts) if self.num_shared_experts else 0

    @property
    def experts_per_token(self) -> float:
        """Routed experts per token: the mean if it is fixed, else the maximum."""
        return self.router.experts_per_token(self.num_experts)

    @property
    def has_static_flops(self) -> bool:
        """True if `experts_per_token`, and so the FLOPs per step, are known in advance."""
        has_even_nulls = not self.router.num_null_experts or self.balance.coef > 0 or self.router.is_self_balancing
        return self.router.has_static_flops and has_even_nulls

    @property
    def can_drop(self) -> bool:
        """True if tokens can be dropped; False if every expert's capacity is the whole sequence."""
        fewest = min(getattr(self.router, "top_k_choices", None) or [getattr(self.router, "top_k", 1)])
        return self.capacity.factor is not None and self.capacity.factor * fewest < self.num_experts

    @property
    def aux_losses(self) -> AuxLosses:
        """The auxiliary losses as values."""
        return AuxLosses(
            balance=self.balance,
            cv_squared=self.cv_squared,
            device_balance=self.device_balance,
            diversity_coef=self.diversity_coef,
            z_loss_coef=self.z_loss_coef,
            num_null_experts=self.router.num_null_experts,
            choices_per_token=getattr(self.router, "top_k", self.experts_per_token),
            has_probs=self.router.has_probs,
            is_always_even=self.router.is_always_even(self.num_experts),
        )

    def check_top_k(self, top_k: int) -> None:
        """Check a k that overrides the configured one for a single call.

        Raises:
            ValueError: if the router cannot select that many experts.
        """
        if not hasattr(self.router, "top_k"):
            raise ValueError(f"top_k {top_k} for one call: {self.router.kind} has no top_k")
        problems = list(self.router.model_copy(update={"top_k": top_k}).problems_among(self.num_experts))
        if top_k < 1 or top_k > self.num_experts + self.router.num_null_experts or problems:
            reason = f"{problems[0].key}: {problems[0].message}" if problems else f"{self.num_experts} experts"
            raise ValueError(f"top_k {top_k} for one call: {reason}")

    def problems(self) -> Iterator[Problem]:
        """Check the router, capacity and losses against each other."""
        yield from self._layer_problems()
        for problem in self.router.problems_among(self.num_experts):
            yield Problem(f"router.{problem.key}", problem.message)
        if self.capacity.factor is not None and not self.router.has_fixed_k:
            yield Problem("capacity.factor", f"{self.router.why_no_capacity}; use factor: null")
        if self.balance.convention == "gshard_first_choice" and not self.router.ranks_choices:
            why = f"needs a router that ranks its choices, not {self.router.kind}"
            yield Problem("balance.convention", f"gshard_first_choice {why}; use canonical")
        if self.balance.convention == "gshard_first_choice" and self.router.num_null_experts:
            yield Problem("balance.convention", "gshard_first_choice does not support null experts; use canonical")
        if self.capacity.policy == "choice_major" and self.capacity.factor is not None and not self.router.has_probs:
            yield Problem("capacity.policy", f"{self.router.kind} does not rank choices; use position or random")
        if self.balance.convention == "hf" and not self.router.has_static_flops:
            has_k = hasattr(self.router, "top_k")
            why = "k changes from step to step" if has_k else f"{self.router.kind} has no k"
            yield Problem("balance.convention", f"hf means k times ours, and {why}; use canonical")
        yield from self._cv_squared_problems()
        yield from self._device_balance_problems()
        if self.diversity_coef and self.router.most_experts(self.num_experts) < 2:
            yield Problem("diversity_coef", "needs at least two experts per token, whose outputs are compared; use 0")

    def _layer_problems(self) -> Iterator[Problem]:
        if self.layers is not None and (self.first_dense_layers, self.every) != (0, 1):
            given = f"first_dense_layers {self.first_dense_layers} and every {self.every}"
            yield Problem("layers", f"names the MoE layers, and so do {given}; remove either")
        for before, layer in pairwise(self.layers or ()):
            if layer <= before:
                yield Problem("layers", f"{layer} after {before}: list each layer once, in ascending order")
                break
        if self.shared_d_ff is not None and not self.num_shared_experts:
            text = f"{self.shared_d_ff} has no effect without shared experts; use num_shared_experts: 1, or null"
            yield Problem("shared_d_ff", text)
        if self.shared_gate and not self.num_shared_experts:
            yield Problem(
                "shared_gate", "true has no effect without shared experts; use num_shared_experts: 1, or false"
            )

    def _cv_squared_problems(self) -> Iterator[Problem]:
        kind, choices = self.router.kind, self.num_experts + self.router.num_null_experts
        if self.cv_squared.load_coef and not self.router.estimates_load:
            yield Problem("cv_squared.load_coef", f"only noisy_top_k estimates a load, not {kind}; use 0")
        elif self.cv_squared.load_coef and getattr(self.router, "top_k", 0) >= choices:
            yield Problem(
                "cv_squared.load_coef", f"every token takes all {choices} experts, so the load is uniform; use 0"
            )
        if self.cv_squared.importance_coef and not self.router.learns_weights:
            yield Problem("cv_squared.importance_coef", f"the weights of {kind} are not learned; use 0")

    def _device_balance_problems(self) -> Iterator[Problem]:
        groups = self.device_balance.groups
        if self.device_balance.coef == 0:
            return
        if not self.router.has_probs:
            yield Problem("device_balance.coef", f"{self.router.kind} has no probabilities to balance; use 0")
        if groups == 1:
            yield Problem("device_balance.groups", "1 group is always balanced; use 2 or more, or coef: 0")
        if self.num_experts % groups:
            what = f"{groups} does not divide num_experts {self.num_experts}"
            yield Problem("device_balance.groups", f"{what}; use one of {divisors(self.num_experts, near=groups)}")
        if self.router.num_null_experts:
            yield Problem("device_balance.coef", "null experts are in no group; use 0, or no null experts")
