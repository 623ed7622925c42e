"""The auxiliary losses that a config turns on, and the tokens whose sums each one is computed from. Imports no torch.

A loss of rows does not depend on how a step is split into micro-batches and over ranks. Neither does a loss of the
whole step, because every micro-batch gets the sums of the step before its own share is computed
(`engine/global_stats.py`). A loss of one micro-batch, or of those so far, depends on the layout, and `prove` labels it.
"""

from dataclasses import dataclass, field
from typing import Literal

from trainer.moe.layer_options import BalanceConfig, CvSquaredConfig, DeviceBalanceConfig

Scope = Literal["row", "step", "previous_step", "running", "micro_batch"]
"""Tokens that are summed: of each row, of the step, of the previous step, of the micro-batches so far, of this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """An auxiliary loss with a positive coefficient."""

    name: str
    """Name in metrics.jsonl, without `_loss`."""
    coef: float
    scope: Scope

    @property
    def is_layout_invariant(self) -> bool:
        """True if the loss is the same under every layout."""
        return self.scope not in ("running", "micro_batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxLosses:
    """The auxiliary losses of a model's MoE layers, with what they need to know about its router."""

    balance: BalanceConfig = field(default_factory=BalanceConfig)
    cv_squared: CvSquaredConfig = field(default_factory=CvSquaredConfig)
    device_balance: DeviceBalanceConfig = field(default_factory=DeviceBalanceConfig)
    diversity_coef: float = 0.0
    z_loss_coef: float = 0.0
    num_null_experts: int = 0
    choices_per_token: float = 1
    """k, null experts included; only the `hf` convention uses it."""
    has_probs: bool = True
    is_always_even: bool = False
    """Every expert always gets the same number of tokens of every sequence."""

    def terms(self) -> list[LossTerm]:
        """Return every loss that is on. The router's own loss is always listed: only the router knows if it has one."""
        counts, cv = self._scope_of_counts(), self.cv_squared
        weights: Scope = "row" if cv.scope == "sequence" else "step"
        terms = [
            LossTerm(name="balance", coef=self.balance.coef if self.has_probs else 0, scope=counts),
            LossTerm(name="device_balance", coef=self.device_balance.coef if self.has_probs else 0, scope=counts),
            LossTerm(name="importance", coef=cv.importance_coef, scope=weights),
            LossTerm(name="load", coef=cv.load_coef, scope=weights),
            LossTerm(name="z", coef=self.z_loss_coef, scope="row"),
            LossTerm(name="diversity", coef=self.diversity_coef, scope="row"),
            LossTerm(name="router", coef=1.0, scope="row"),  # its coefficient is already applied
        ]
        return [term for term in terms if term.coef > 0]

    def _scope_of_counts(self) -> Scope:
        """Return the tokens over which the balance losses count assignments."""
        balance = self.balance
        is_even = self.is_always_even and balance.convention != "gshard_first_choice"
        if is_even or balance.scope == "sequence":  # the shares of an even load are the same over any tokens
            return "row"
        if balance.scope == "micro_batch":
            return "micro_batch"
        return "step" if balance.counts == "exact" else balance.counts
