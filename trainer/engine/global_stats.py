"""Global-batch statistics that the auxiliary losses of a micro-batch need.

A loss over the global batch is not the sum of its micro-batches' losses: it is a function of sums over all of them.
Before the first backward pass these are known only from a counting pass (`balance.counts: exact`), or approximately,
from the previous step.

# L MoE layers, E experts.
"""

import functools
import operator
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.engine.moe_layers import MoELayers
from trainer.engine.passes import Passes, RunLayers
from trainer.engine.reduce import all_reduce_packed
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPTOutput
from trainer.moe.loss_stats import LossStats, RowStats
from trainer.moe.losses import Denominators
from trainer.moe.terms import AuxLosses


class GlobalStats:
    """Provides each micro-batch's losses with the sums, over all ranks, that they are computed from.

    `stage` are the ranks with the same layers, which see all tokens together; those of `sharing_rows` have parts of the
    same rows.
    """

    def __init__(self, losses: AuxLosses | None, stage: Group, sharing_rows: Group) -> None:
        self._losses, self._stage, self._sharing_rows = losses, stage, sharing_rows
        terms = [] if losses is None else losses.terms()
        of_rows = ("balance", "device_balance", "importance", "load")
        self._needs_rows = sharing_rows.size > 1 and (
            any(term.scope == "row" and term.name in of_rows for term in terms)
            or (losses is not None and losses.balance.scope == "sequence")  # logged even without a coefficient
        )
        self._needs_exact_sums = any(term.scope == "step" for term in terms)
        self._has_loss_of_counts = any(term.name in ("balance", "device_balance") for term in terms)

    @property
    def is_balance_only_logged(self) -> bool:
        """True if no loss uses counts: then no counting pass is run, and the balance loss of the whole step is logged.

        Logged values must not depend on the layout either, whatever the scope of the loss.
        """
        balance = self._losses.balance if self._losses else None
        return balance is not None and balance.scope != "sequence" and not self._has_loss_of_counts

    def counting_pass(
        self, batches: Sequence[Batch], passes: Passes, run: RunLayers, config: ModelConfig
    ) -> LossStats | None:
        """Return the sums of the whole step from a pass without gradients; None if no loss needs one."""
        if len(batches) == 1 or not self._needs_exact_sums:
            return None
        parts: list[LossStats] = []

        def take(output: GPTOutput, _: Batch, layers: Collection[int]) -> None:
            local = self.local(output)
            if local is not None:
                parts.append(local.mapped(MoELayers.of(config, layers).placed))

        passes.evaluate(batches, run, take)
        return self._all_reduce(parts)

    def count_tokens(self, batches: Sequence[Batch], mesh: Mesh) -> Denominators:
        """Count the target and routed tokens of the whole step, over all ranks."""
        parts = [sum(b.target_weight for b in batches), sum(b.num_valid for b in batches)]
        if mesh.pp.index > 0:  # the ranks of a pipeline have the same tokens
            parts = [0, 0]
        counts = torch.tensor(parts, dtype=torch.float64)  # on the host; exact for numbers of tokens
        target_weight, routed_tokens = mesh.host.all_reduce_(counts).tolist()
        return Denominators(target_tokens=target_weight or 1.0, routed_tokens=max(1, int(routed_tokens)))

    def local(self, output: GPTOutput) -> LossStats | None:
        """Return this micro-batch's own sums; None without MoE layers."""
        if self._losses is None or not output.moe:
            return None
        return LossStats.of(output.moe, self._losses.balance)

    def of_rows(self, output: GPTOutput) -> RowStats | None:
        """Return the sums of this micro-batch's whole rows; None: they are here, or no loss needs them."""
        if self._losses is None or not output.moe or not self._needs_rows:
            return None
        here = RowStats.of(output.moe, self._losses.balance)
        return here.with_tensors(all_reduce_packed(here.tensors(), self._sharing_rows))

    def for_losses(
        self, prepass: LossStats | None, local: LossStats | None, *, choices: Tensor, previous_counts: Tensor
    ) -> LossStats | None:
        """Return the sums for the losses of one micro-batch; None: they use its own.

        `prepass` has sums of the whole step, if there was a counting pass; `choices` counts (L, E) of the micro-batches
        so far, including this one.
        """
        if self._losses is None or local is None:
            return None
        if prepass is None and self._needs_exact_sums:
            prepass = self._all_reduce([local])  # this is the only micro-batch
        counts = {"previous_step": previous_counts, "running": choices}.get(self._losses.balance.counts)
        return prepass if counts is None else replace(prepass or local, counts=counts)

    def _all_reduce(self, parts: Sequence[LossStats]) -> LossStats | None:
        """Sum over the micro-batches of all ranks; None without MoE layers."""
        if not parts:
            return None
        local = functools.reduce(operator.add, parts)
        return local.with_tensors(all_reduce_packed(local.tensors(), self._stage))
