"""The auxiliary losses that a config turns on, and which tokens each one is made of. Imports no torch.

A loss of rows is the same however a step is cut into micro-batches and over ranks. One that knows the sums of the whole
step is, too, since every micro-batch is told them before its own loss is made (`engine/global_stats.py`). One that is
made of a micro-batch, or of those that were there so far, hangs on the layout, and `prove` labels it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.moe.config import MoEConfig

Scope = Literal["row", "step", "previous_step", "running", "micro_batch"]
"""Whose sums: each row's, the whole step's, those of the step before, of the micro-batches so far, of this one."""
_OF_A_LAYOUT: tuple[Scope, ...] = ("running", "micro_batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """One auxiliary loss with a coefficient above 0."""

    name: str
    """Name in metrics.jsonl, without `_loss`."""
    coef: float
    made_of: Literal["tokens", "counts", "weights"]
    """Values of single tokens, counts of assignments, or sums of combine weights and smooth counts."""
    scope: Scope

    @property
    def is_layout_invariant(self) -> bool:
        """True if the loss is the same under every layout."""
        return self.scope not in _OF_A_LAYOUT


def loss_terms(moe: MoEConfig) -> list[LossTerm]:
    """Return every auxiliary loss that is on; a router that has no loss of its own leaves the last one out."""
    return [term for term in _all_terms(moe) if term.coef > 0]


def _all_terms(moe: MoEConfig) -> Iterator[LossTerm]:
    if moe.router.has_probs:
        counts = _scope_of_counts(moe)
        yield LossTerm(name="balance", coef=moe.balance.coef, made_of="counts", scope=counts)
        yield LossTerm(name="device_balance", coef=moe.device_balance.coef, made_of="counts", scope=counts)
    cv = moe.cv_squared
    weights: Scope = "row" if cv.scope == "sequence" else "step"
    yield LossTerm(name="importance", coef=cv.importance_coef, made_of="weights", scope=weights)
    yield LossTerm(name="load", coef=cv.load_coef, made_of="weights", scope=weights)
    yield LossTerm(name="z", coef=moe.z_loss_coef, made_of="tokens", scope="row")
    yield LossTerm(name="diversity", coef=moe.diversity_coef, made_of="tokens", scope="row")
    yield LossTerm(name="router", coef=1.0, made_of="tokens", scope="row")  # its coefficient is in it


def _scope_of_counts(moe: MoEConfig) -> Scope:
    """Return over which tokens assignments are counted for a balance loss."""
    balance = moe.balance
    is_even = moe.router.is_always_even(moe.num_experts) and balance.convention != "gshard_first_choice"
    if is_even or balance.scope == "sequence":  # shares of an even load are the same over any tokens
        return "row"
    if balance.scope == "micro_batch":
        return "micro_batch"
    return "step" if balance.counts == "exact" else balance.counts
