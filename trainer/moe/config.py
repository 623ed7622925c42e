"""The `model.moe` section: router, experts, capacity and auxiliary losses. Imports no torch."""

from collections.abc import Iterator
from typing import Literal

from trainer.config.base import Config, Problem, divisors
from trainer.config.numbers import Coefficient, Count, Experts, ExtraExperts, Factor, Length, Whole, Width
from trainer.moe.routers.config.options import EvenOptions
from trainer.moe.routers.config.token_choice import TopKRouterConfig
from trainer.moe.routers.registry import RouterConfig

_OWN_ROOM = "this router decides by itself how many tokens an expert gets"
_WHY_NO_CAPACITY = {
    "dense": "the dense router sends every token to every expert",
    "top_p": "how many experts tokens take under top_p is not known before, so no room can be sized by it",
}


class CapacityConfig(Config):
    """Expert capacity: an expert accepts C = max(min, ceil(factor * k * S / E)) rows from each sequence of S positions.

    A sequence is a row of the batch, whatever it is packed with. Its padding takes no room, and counts in S: what is
    sized by C is the same in every step.
    """

    factor: Factor | None = None
    """Rows an expert accepts, in units of its fair share. Null is dropless."""
    min: Length = 4
    """Never less than this many rows, however short the sequence."""
    scope: Literal["sequence", "rank"] = "sequence"
    """Tokens that share the C rows: a sequence, or (as elsewhere, not layout-invariant) a rank's micro-batch."""
    policy: Literal["position", "choice_major", "probability", "random"] = "position"
    """Priority of tokens: earlier tokens first; all first choices before any second (GShard); heavier weights first; or
    tokens at random (DeepSpeed's random token selection; in evaluation by position).

    Only `position` is causal: under the others a later token can evict an earlier one.
    """
    renormalize_after_drop: bool = False
    """Give a token's dropped weight to its surviving experts."""

    def problems(self) -> Iterator[Problem]:
        """Refuse options that could have no effect."""
        if self.factor is None and self.renormalize_after_drop:
            yield Problem(
                "renormalize_after_drop", "true has no effect without a capacity.factor; set one or remove it"
            )


class BalanceConfig(Config):
    """The load-balancing loss (Switch, GShard), by default over the whole global batch (arXiv 2501.11873)."""

    coef: Coefficient = 0.01
    """Weight of the loss. 0 turns it off; the value is logged all the same."""
    scope: Literal["sequence", "global_batch", "micro_batch"] = "global_batch"
    """Over which tokens the load is counted. `micro_batch` is for parity with others: not layout-invariant."""
    counts: Literal["exact", "previous_step", "running"] = "exact"
    """Source of a global batch's counts under gradient accumulation.

    `exact`: a pass without gradients first. `previous_step`: the step before, free. `running`: the micro-batches so
    far, which is what others do and not layout-invariant.
    """
    convention: Literal["canonical", "hf", "megatron", "gshard_first_choice"] = "canonical"
    """Convention of `coef`: ours (`canonical`), or that of another trainer.

    `hf`: as in transformers, k times ours. `megatron`: as in Megatron, summed over layers. `gshard_first_choice`:
    as in GShard, from first choices only.
    """

    def problems(self) -> Iterator[Problem]:
        """Refuse options that could have no effect."""
        if self.scope != "global_batch" and self.counts != "exact":
            yield Problem("counts", f"{self.counts} is for scope: global_batch, not {self.scope}; remove it")


class CvSquaredConfig(Config):
    """Squared coefficients of variation over experts: variance over squared mean, 0 when even (arXiv 1701.06538)."""

    importance_coef: Coefficient = 0.0
    """Weight of the importance loss: of the sums of the combine weights. 0 turns it off."""
    load_coef: Coefficient = 0.0
    """Weight of the load loss: of the smooth counts that `noisy_top_k` estimates. 0 turns it off."""
    scope: Literal["sequence", "global_batch"] = "global_batch"
    """Over which tokens is summed before the variation is taken. `global_batch` is exact however a step is cut."""


class DeviceBalanceConfig(Config):
    """The balance loss of groups of experts instead of experts (DeepSeek-V2, arXiv 2405.04434, eq. 26).

    Groups are parts of the model, not of the machine: what they are does not change with `parallel`. Tokens are counted
    over the same scope as by `balance`.
    """

    coef: Coefficient = 0.0
    """Weight of the loss. 0 turns it off."""
    groups: Experts = 4
    """Equal neighbouring parts that the experts are cut into."""


class MoEConfig(Config):
    """The mixture-of-experts layers of the model."""

    first_dense_layers: Whole = 0
    """The first layers stay dense."""
    every: Count = 1
    """After those, every n-th layer is MoE: with 2, the second, fourth and so on."""
    num_experts: Experts = 8
    """Routed experts, E."""
    d_ff: Width = 512
    """Hidden width of one expert, F."""
    num_shared_experts: ExtraExperts = 0
    """Experts that every token visits, each d_ff wide, added with weight 1."""
    router: RouterConfig = TopKRouterConfig()
    """Router, which chooses a token's experts."""
    capacity: CapacityConfig = CapacityConfig()
    """Capacity of an expert."""
    balance: BalanceConfig = BalanceConfig()
    """Load-balancing loss."""
    cv_squared: CvSquaredConfig = CvSquaredConfig()
    """Importance and load losses."""
    device_balance: DeviceBalanceConfig = DeviceBalanceConfig()
    """Load-balancing loss between groups of experts."""
    diversity_coef: Coefficient = 0.0
    """Weight of the mean squared cosine between the outputs of a token's experts: at 0 they are orthogonal."""
    z_loss_coef: Coefficient = 0.001
    """Weight of the mean squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906). 0 turns it off."""

    @property
    def experts_per_token(self) -> float:
        """Number of routed experts of a token: the mean if it is fixed, else the maximum."""
        return self.router.experts_per_token(self.num_experts)

    @property
    def has_static_flops(self) -> bool:
        """True if `experts_per_token`, and so the FLOPs of a step, are known in advance."""
        has_even_nulls = not self.router.num_null_experts or self.balance.coef > 0 or self.router.is_self_balancing
        return self.router.has_static_flops and has_even_nulls

    @property
    def can_drop(self) -> bool:
        """True if an expert can be full: not where each has room for every token."""
        fewest = min(getattr(self.router, "top_k_choices", None) or [getattr(self.router, "top_k", 1)])
        return self.capacity.factor is not None and self.capacity.factor * fewest < self.num_experts

    def problems(self) -> Iterator[Problem]:
        """Check the router against the experts."""
        for problem in self.router.problems_among(self.num_experts):
            yield Problem(f"router.{problem.key}", problem.message)
        if self.capacity.factor is not None and not self.router.has_fixed_k:
            yield Problem("capacity.factor", f"{_WHY_NO_CAPACITY.get(self.router.kind, _OWN_ROOM)}; use factor: null")
        if self.balance.convention == "gshard_first_choice" and not self.router.ranks_choices:
            yield Problem(
                "balance.convention",
                f"gshard_first_choice needs a router that ranks its choices, not {self.router.kind}; use canonical",
            )
        if self.balance.convention == "gshard_first_choice" and self.router.num_null_experts:
            yield Problem("balance.convention", "gshard_first_choice knows no null experts; use canonical")
        if self.capacity.policy == "choice_major" and self.capacity.factor is not None and not self.router.has_probs:
            yield Problem("capacity.policy", f"{self.router.kind} ranks no choices; use position or random")
        if self.balance.convention == "hf" and not self.router.has_static_flops:
            why = "top_p has no k" if self.router.kind == "top_p" else "every step draws another k"
            yield Problem("balance.convention", f"hf means k times ours, and {why}; use canonical")
        yield from self._cv_squared_problems()
        yield from self._device_balance_problems()
        if self.diversity_coef and self.router.most_experts(self.num_experts) < 2:
            yield Problem(
                "diversity_coef", "needs tokens with two experts or more, whose outputs can be compared; use 0"
            )

    def _cv_squared_problems(self) -> Iterator[Problem]:
        kind, choices = self.router.kind, self.num_experts + self.router.num_null_experts
        if self.cv_squared.load_coef and kind != "noisy_top_k":
            yield Problem("cv_squared.load_coef", f"only noisy_top_k estimates a load, not {kind}; use 0")
        elif self.cv_squared.load_coef and getattr(self.router, "top_k", 0) >= choices:
            yield Problem(
                "cv_squared.load_coef", f"every token takes all {choices} experts, so the load is even; use 0"
            )
        if self.cv_squared.importance_coef and isinstance(self.router, EvenOptions):
            yield Problem("cv_squared.importance_coef", f"the weights of {kind} are not learned; use 0")

    def _device_balance_problems(self) -> Iterator[Problem]:
        groups = self.device_balance.groups
        if self.device_balance.coef == 0:
            return
        if not self.router.has_probs:
            yield Problem("device_balance.coef", f"{self.router.kind} has no probabilities to even out; use 0")
        if groups == 1:
            yield Problem("device_balance.groups", "1 group is always even; use 2 or more, or coef: 0")
        if self.num_experts % groups:
            yield Problem(
                "device_balance.groups",
                f"{groups} does not divide num_experts {self.num_experts}; "
                f"use one of {divisors(self.num_experts, near=groups)}",
            )
        if self.router.num_null_experts:
            yield Problem("device_balance.coef", "null experts are in no group; use 0, or no null experts")
