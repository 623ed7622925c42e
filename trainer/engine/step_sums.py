"""Sums of the micro-batches of one optimizer step on this rank, and the share of the objective of each."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.engine.base import RoutingSums
from trainer.engine.global_stats import GlobalStats
from trainer.engine.moe_layers import MoELayers
from trainer.engine.reduce import StepTotals
from trainer.models.gpt import GPTOutput
from trainer.moe.loss_stats import LossStats
from trainer.moe.losses import Denominators, objective
from trainer.moe.terms import AuxLosses


@dataclass(slots=True, kw_only=True)
class StepSums:
    """Sums over the micro-batches so far; tables have rows for all MoE layers of the model."""

    losses: AuxLosses | None
    global_stats: GlobalStats
    denominators: Denominators
    prepass: LossStats | None
    """Sums of the whole step, if there was a counting pass."""
    previous_counts: Tensor
    """(L, E) assignments of the step before."""
    total: StepTotals = field(default_factory=StepTotals)
    routing: RoutingSums | None = None
    choices: Tensor = field(init=False)
    """(L, E) assignments counted by the balance loss; (L, E + 1) with null experts."""

    def __post_init__(self) -> None:
        self.choices = torch.zeros_like(self.previous_counts)

    def add(self, output: GPTOutput, layers: MoELayers) -> Tensor:
        """Add a micro-batch, or the part of one that has these layers; return its share of the objective."""
        local = self.global_stats.local(output)
        if local is not None:
            self.choices = self.choices + layers.placed(local.counts)
        share = objective(
            output.loss_sum,
            output.moe,
            global_stats=self.global_stats.for_losses(
                None if self.prepass is None else self.prepass.mapped(layers.taken),
                local,
                choices=layers.taken(self.choices),
                previous_counts=layers.taken(self.previous_counts),
            ),
            denominators=self.denominators,
            losses=self.losses,
            num_moe_layers=layers.total,
            vocab_z=output.vocab_z,
            row_stats=self.global_stats.of_rows(output),
        )
        self.total.add(share, output, layers)
        here = RoutingSums.of(output.moe)
        here = here and here.mapped(layers.placed)
        self.routing = here if self.routing is None or here is None else self.routing + here
        return share.total


@dataclass(slots=True)
class EvaluatedBatch:
    """Sums of a batch that was evaluated, or of the layers of it that are here."""

    loss_sum: Tensor | float = 0.0
    """Cross-entropy in nats."""
    routing: RoutingSums | None = None
    experts: Tensor | None = None

    def add(self, output: GPTOutput, layers: MoELayers) -> None:
        """Add what some layers gave."""
        self.loss_sum = self.loss_sum + output.row_loss.double().sum()
        if (here := RoutingSums.of(output.moe)) is not None:
            here = here.mapped(layers.placed)
            self.routing = here if self.routing is None else self.routing + here
