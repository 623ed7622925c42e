"""Global-batch statistics that the auxiliary losses of a micro-batch need.

A loss over the global batch is no sum of its micro-batches' losses: it is made of sums over all of them. They are known
before the first one only if they were counted (`balance.counts: exact`), or taken from the step before.

# L MoE layers, E experts.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.distributed.collectives import Group
from trainer.engine.reduce import all_reduce_packed
from trainer.models.gpt import GPTOutput
from trainer.moe.config import MoEConfig
from trainer.moe.loss_stats import LossStats
from trainer.moe.terms import loss_terms


class GlobalStats:
    """Decides which sums a step's losses are made of, and gets them.

    Args:
        moe: the `model.moe` section; None for a dense model.
        world: all ranks, over which sums are taken.
    """

    def __init__(self, moe: MoEConfig | None, world: Group) -> None:
        self._moe, self._world = moe, world
        terms = [] if moe is None else loss_terms(moe)
        self._needs_exact_sums = any(term.scope == "step" for term in terms)
        self._has_loss_of_counts = any(term.made_of == "counts" for term in terms)

    @property
    def is_balance_only_logged(self) -> bool:
        """True if no loss uses counts: then there is no counting pass, and the step's own balance is logged.

        What is logged hangs on the layout as little as what is learned, whatever tokens a loss would count.
        """
        balance = self._moe.balance if self._moe else None
        return balance is not None and balance.scope != "sequence" and not self._has_loss_of_counts

    def before(self, batches: Sequence[Batch], forward: Callable[[Batch], GPTOutput]) -> LossStats | None:
        """Return the sums of the whole step, by a pass without gradients; None where no loss needs one."""
        if len(batches) == 1 or not self._needs_exact_sums:
            return None
        with torch.no_grad():
            parts = [self.own(forward(batch)) for batch in batches]
        return self._over_ranks([part for part in parts if part is not None])

    def own(self, output: GPTOutput) -> LossStats | None:
        """Return a micro-batch's sums under the configured convention; None without a MoE layer."""
        if self._moe is None or not output.moe:
            return None
        return LossStats.of(output.moe, self._moe.balance)

    def of_step(
        self, before: LossStats | None, own: LossStats | None, *, choices: Tensor, previous_counts: Tensor
    ) -> LossStats | None:
        """Return what the losses of a micro-batch may know of the step; None: only the micro-batch itself.

        Args:
            before: sums of the whole step, if there was a pass for them.
            own: of this micro-batch.
            choices: (L, E) counts of the micro-batches so far, with this one.
            previous_counts: (L, E) of the step before.
        """
        if own is None:
            return None
        if before is None and self._needs_exact_sums:
            before = self._over_ranks([own])  # the only micro-batch: known now
        match self._global_counts:
            case "previous_step":
                return replace(before or own, counts=previous_counts)
            case "running":
                return replace(before or own, counts=choices)
            case _:
                return before

    @property
    def _global_counts(self) -> Literal["exact", "previous_step", "running"] | None:
        """Source of the counts of a global-batch balance loss; None for another scope or no MoE."""
        balance = self._moe.balance if self._moe else None
        return balance.counts if balance is not None and balance.scope == "global_batch" else None

    def _over_ranks(self, parts: Sequence[LossStats]) -> LossStats | None:
        """Add up the micro-batches of all ranks; None without a MoE layer."""
        if not parts:
            return None
        here = functools.reduce(operator.add, parts)
        return here.replaced(all_reduce_packed(here.tensors(), self._world))
