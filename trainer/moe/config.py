"""The `model.moe` section: router, experts, capacity and auxiliary losses. Imports no torch."""

from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config.base import Config, Problem
from trainer.moe.routers.registry import RouterConfig, TopKOptions, TopKRouterConfig


class CapacityConfig(Config):
    """How many rows an expert accepts: C = max(min, ceil(factor * k * S / E)) from each sequence of S positions.

    A sequence is a row of the batch, whatever it is packed with. Its filling takes no room, and counts in S: what is
    sized by C is the same in every step.
    """

    factor: PositiveFloat | None = None
    """Rows an expert accepts, in units of its fair share. Null is dropless."""
    min: PositiveInt = 4
    """Never less than this many rows, however short the sequence."""
    scope: Literal["sequence", "rank"] = "sequence"
    """Who shares the C rows: one sequence, or (as in other trainers, not layout-invariant) this rank's micro-batch."""
    policy: Literal["position", "choice_major", "probability"] = "position"
    """Who is kept: earlier tokens first; all first choices before any second (GShard); or heavier weights first.

    Only `position` is causal: under the other two a later token can evict an earlier one.
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

    coef: NonNegativeFloat = 0.01
    """Weight of the loss. 0 turns it off; the value is logged all the same."""
    scope: Literal["sequence", "global_batch", "micro_batch"] = "global_batch"
    """Over which tokens the load is counted. `micro_batch` is for parity with others: not layout-invariant."""
    counts: Literal["exact", "previous_step", "running"] = "exact"
    """Where a global batch's counts come from when it is accumulated.

    `exact`: a pass without gradients first. `previous_step`: the step before, free. `running`: the micro-batches so
    far, which is what others do and not layout-invariant.
    """
    convention: Literal["canonical", "hf", "megatron", "gshard_first_choice"] = "canonical"
    """What `coef` means: ours (`canonical`), or what it means in another trainer.

    `hf`: as in transformers, k times ours. `megatron`: as in Megatron, summed over layers. `gshard_first_choice`:
    as in GShard, from first choices only.
    """

    def problems(self) -> Iterator[Problem]:
        """Refuse options that could have no effect."""
        if self.scope != "global_batch" and self.counts != "exact":
            yield Problem("counts", f"{self.counts} is for scope: global_batch, not {self.scope}; remove it")


class MoEConfig(Config):
    """The mixture-of-experts layers of the model."""

    first_dense_layers: NonNegativeInt = 0
    """The first layers stay dense."""
    every: PositiveInt = 1
    """After those, every n-th layer is MoE: with 2, the second, fourth and so on."""
    num_experts: PositiveInt = 8
    """Routed experts, E."""
    d_ff: PositiveInt = 512
    """Hidden width of one expert, F."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that every token visits, each d_ff wide, added with weight 1."""
    router: RouterConfig = TopKRouterConfig()
    """Which experts a token visits."""
    capacity: CapacityConfig = CapacityConfig()
    """How much an expert accepts."""
    balance: BalanceConfig = BalanceConfig()
    """Load-balancing loss."""
    z_loss_coef: NonNegativeFloat = 0.001
    """Weight of the mean squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906). 0 turns it off."""

    @property
    def top_k(self) -> int:
        """Experts per token, k."""
        return getattr(self.router, "top_k", self.num_experts)

    def problems(self) -> Iterator[Problem]:
        """Check the router against the experts."""
        if self.top_k > self.num_experts:
            yield Problem(
                "router.top_k",
                f"{self.top_k} is more than num_experts {self.num_experts}; use 1 to {self.num_experts}",
            )
        if self.router.kind == "dense" and self.capacity.factor is not None:
            yield Problem("capacity.factor", "the dense router sends every token to every expert; use factor: null")
        if self.balance.convention == "gshard_first_choice" and not isinstance(self.router, TopKOptions):
            yield Problem(
                "balance.convention",
                f"gshard_first_choice needs a router that ranks its choices, not {self.router.kind}; use canonical",
            )
