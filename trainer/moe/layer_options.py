"""Options of capacity and of the auxiliary losses: sections of `model.moe` that the layer takes as values. No torch."""

from collections.abc import Iterator
from typing import Literal

from trainer.config.base import Config, Problem
from trainer.config.numbers import Coefficient, Experts, Factor, Length


class CapacityConfig(Config):
    """Expert capacity: an expert accepts C = max(min, ceil(factor * k * S / E)) rows from each sequence of S positions.

    A sequence is a row of the batch, however it is packed. Padding takes no capacity but counts in S, so that every
    shape that depends on C is the same in every step.
    """

    factor: Factor | None = None
    """Rows an expert accepts, in units of its fair share. Null: dropless."""
    min: Length = 4
    """Lower bound of C, for short sequences."""
    scope: Literal["sequence", "rank"] = "sequence"
    """Tokens that compete for the C rows: those of a sequence, or of a rank's micro-batch (not layout-invariant)."""
    policy: Literal["position", "choice_major", "probability", "random"] = "position"
    """Priority of tokens: earlier tokens first; all first choices before any second (GShard); higher weights first; or
    random (DeepSpeed's random token selection; by position in evaluation).

    Only `position` is causal: under the others a later token can evict an earlier one.
    """
    renormalize_after_drop: bool = False
    """Redistribute a token's dropped weight over its remaining experts."""

    def problems(self) -> Iterator[Problem]:
        """Refuse options that have no effect."""
        if self.factor is None and self.renormalize_after_drop:
            yield Problem(
                "renormalize_after_drop", "true has no effect without a capacity.factor; set one or remove it"
            )


class BalanceConfig(Config):
    """Load-balancing loss (Switch, GShard), over the whole global batch by default (arXiv 2501.11873)."""

    coef: Coefficient = 0.01
    """Weight of the loss. 0 turns it off; its value is still logged."""
    scope: Literal["sequence", "global_batch", "micro_batch"] = "global_batch"
    """Tokens over which the load is counted. `micro_batch`, for parity with other trainers, is not layout-invariant."""
    counts: Literal["exact", "previous_step", "running"] = "exact"
    """Counts of the global batch under gradient accumulation.

    `exact`: from an additional forward pass without gradients. `previous_step`: those of the previous step, for free.
    `running`: those of the micro-batches so far, as in other trainers; not layout-invariant.
    """
    convention: Literal["canonical", "hf", "megatron", "gshard_first_choice"] = "canonical"
    """Convention of `coef`: ours (`canonical`) or that of another trainer.

    `hf`: as in transformers, k times ours. `megatron`: as in Megatron, summed over layers. `gshard_first_choice`: as in
    GShard, computed from first choices only.
    """

    def problems(self) -> Iterator[Problem]:
        """Refuse options that have no effect."""
        if self.scope != "global_batch" and self.counts != "exact":
            yield Problem("counts", f"{self.counts} is for scope: global_batch, not {self.scope}; remove it")


class CvSquaredConfig(Config):
    """Squared coefficients of variation over experts: variance over squared mean, 0 if uniform (arXiv 1701.06538)."""

    importance_coef: Coefficient = 0.0
    """Weight of the importance loss, computed from the sums of combine weights. 0 turns it off."""
    load_coef: Coefficient = 0.0
    """Weight of the load loss, computed from the smooth counts of `noisy_top_k`. 0 turns it off."""
    scope: Literal["sequence", "global_batch"] = "global_batch"
    """Tokens that are summed before the variation is computed. Both are exact under gradient accumulation."""


class DeviceBalanceConfig(Config):
    """Balance loss over groups of experts instead of experts (DeepSeek-V2, arXiv 2405.04434, eq. 26).

    Groups belong to the model, not to the machine: they do not change with `parallel`. Tokens are counted over the
    scope of `balance`.
    """

    coef: Coefficient = 0.0
    """Weight of the loss. 0 turns it off."""
    groups: Experts = 4
    """Number of equal groups of consecutive experts."""
