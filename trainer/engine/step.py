"""The optimizer step shared by all engines: forward and backward passes, reductions, and the decision to update.

Everything is summed and divided once: each micro-batch contributes its share of the objective, whose denominators were
counted before the first forward pass. No factor of the number of micro-batches or ranks exists anywhere.

# L MoE layers, E experts.
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, replace

import torch
from torch import Tensor

from trainer.checkpoint.state import TrainState
from trainer.data.batches.batch import Batch
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine, EvalSums, RoutingSums, StepResult
from trainer.engine.global_stats import GlobalStats
from trainer.engine.moe_layers import MoELayers
from trainer.engine.nonfinite import Findings, describe_findings
from trainer.engine.numerics import NumericsConfig
from trainer.engine.passes import OverlappedModel, Passes, RunLayers, WholeModel
from trainer.engine.reduce import Accumulated, StepTotals, all_reduce_packed, group_squares, read_numbers
from trainer.engine.step_sums import EvaluatedBatch, StepSums
from trainer.engine.weight_average import WeightAverage
from trainer.models.freeze import is_frozen, rate_factors
from trainer.models.gpt import GPT, GPTOutput
from trainer.moe.balance import global_balance_loss
from trainer.moe.dispatch.row_budget import RowBudget
from trainer.moe.routing import RoutingOptions
from trainer.moe.stats import experts_of
from trainer.ops.noise import stable_hash
from trainer.parallel.pipeline_stages import pipeline_stages
from trainer.parallel.stage_relay import StageRelay


class StepEngine(Engine):
    """Runs the micro-batches, reduces the small sums and decides on the update; subclasses hold the gradients."""

    def __init__(self, model: GPT, numerics: NumericsConfig, mesh: Mesh) -> None:
        super().__init__(model)
        self.numerics, self.mesh = numerics, mesh
        if numerics.ema is not None:
            self.average = WeightAverage(numerics.ema, model)
        self.rate_factors = rate_factors(model, numerics.lr_scale)
        self.losses = None if self.moe_config is None else self.moe_config.aux_losses
        self.global_stats = GlobalStats(self.losses, mesh.stage, mesh.rows)
        self.moe_layers = MoELayers.of(model.config, model.blocks.numbers)
        """The MoE layers that are here."""
        self.passes = self._passes(model)
        name_of = {p: name for name, p in self.learning.items()}
        routers = [layer.router for layer in model.moe_layers()]
        self._routers = [[name_of[p] for p in router.parameters() if p in name_of] for router in routers]
        """Names of each router's weights that learn."""

    def _passes(self, model: GPT) -> Passes:
        """Return how micro-batches pass through the layers here."""
        config, mesh = model.config, self.mesh
        if mesh.pp.size == 1:
            whole = OverlappedModel if model.overlaps else WholeModel
            return whole(config.num_layers, mesh.world.recorder)
        from trainer.engine.pipeline import Pipeline  # which imports torch's pipelining

        stages, dtype = pipeline_stages(config, model.vocab_size, mesh.layout), next(model.parameters()).dtype
        relay = StageRelay(stages, mesh.pp, width=config.d_model, dtype=dtype)
        return Pipeline(relay, at_once=1 + model.overlaps)

    # Gradients: implemented by each engine

    @abstractmethod
    def gradients(self) -> TrainState:
        """Return the unclipped gradients of the whole step, by parameter name."""

    def before_forward(self) -> None:
        """Prepare the next forward pass."""

    @abstractmethod
    def begin_backward(self, *, is_last: bool) -> None:
        """Prepare the next backward pass; during the last one of a step the all-reduce can start."""

    @abstractmethod
    def backward(self, objective: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's share."""

    @abstractmethod
    def _reduce_gradients(self) -> Tensor:
        """Finish the reduction of gradients over ranks; return this rank's part of the squared norm, in float64."""

    @abstractmethod
    def _counted_gradients(self, names: Set[str]) -> Mapping[str, Sequence[Tensor]]:
        """Return this rank's pieces of some reduced gradients: over all ranks, each element is there once."""

    @abstractmethod
    def _update(self, lr: float, grad_norm: float) -> None:
        """Clip the gradient, update the weights and discard the gradient."""

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Discard the gradients of a skipped step."""

    @abstractmethod
    def _findings(self, local_objective: Tensor) -> Findings:
        """Find the values that are not finite on this rank."""

    # The step

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        *,
        lr: float,
        skip_above: float | None = None,
        return_experts: bool = False,
        with_router_norms: bool = True,
    ) -> StepResult:
        """Take one optimizer step over the micro-batches."""
        step = self.accumulate(micro_batches, return_experts=return_experts, with_router_norms=with_router_norms)
        return self.apply(step, lr=lr, skip_above=skip_above)

    def accumulate(
        self, micro_batches: Sequence[Batch], *, return_experts: bool = False, with_router_norms: bool = True
    ) -> Accumulated:
        """Run the micro-batches forward and backward, and reduce the gradient over ranks; it is not clipped yet.

        If rows exceed the budget of a dispatcher, the gradient is dropped and computed again with exact sizes.
        """
        layers = [moe.dispatcher for moe in self.model.moe_layers()]
        budgeted = [dispatcher for dispatcher in layers if isinstance(dispatcher, RowBudget)]
        with contextlib.ExitStack() as stack:
            for dispatcher in budgeted:
                stack.enter_context(dispatcher.static_sizes())
            step = self._accumulate(micro_batches, return_experts, with_router_norms)
        overflows = [dispatcher.overflow for dispatcher in budgeted if dispatcher.overflow is not None]
        if not overflows or int(self.mesh.world.all_reduce_(torch.stack(overflows).sum())) == 0:  # waits for the device
            return step
        self._drop_gradients()
        self.repeated_steps += 1
        return self._accumulate(micro_batches, return_experts, with_router_norms)

    def _accumulate(self, micro_batches: Sequence[Batch], return_experts: bool, with_router_norms: bool) -> Accumulated:
        recorder = self.mesh.world.recorder
        recorder.enter("counting")
        batches = [batch.to(self.device) for batch in micro_batches]
        denominators = self.global_stats.count_tokens(batches, self.mesh)
        options = RoutingOptions(
            noise_seed=self.numerics.seed, top_k=self._drawn_top_k(), return_experts=return_experts
        )
        run = RunLayers(self, options)
        sums = StepSums(
            losses=self.losses,
            global_stats=self.global_stats,
            denominators=denominators,
            prepass=self.global_stats.counting_pass(batches, self.passes, run, self.model.config),
            previous_counts=self.previous_counts,
        )
        experts: list[Tensor] = []

        def share(output: GPTOutput, batch: Batch, layers: range) -> Tensor:
            if return_experts:
                experts.append(experts_of(output.moe, batch.tokens.shape))
            return sums.add(output, MoELayers.of(self.model.config, layers))

        self.passes.train(batches, run, share, self)
        total, routing, choices = sums.total, sums.routing, sums.choices
        recorder.enter("gradient sums")
        square, local_objective = self._reduce_gradients(), torch.as_tensor(total.objective)
        if routing is not None and with_router_norms:
            counted = self._counted_gradients({name for names in self._routers for name in names})
            squares = group_squares(self._routers, counted, self.device)
            routing = replace(routing, router_squares=self.moe_layers.placed(squares))
        total, choices, routing, square = self._reduce_sums(total, choices, routing, square)
        routing = routing and replace(routing, prob_sum=total.prob_sum)
        if self.losses is not None and self.global_stats.is_balance_only_logged and total.prob_sum is not None:
            tokens, num_null_experts = denominators.routed_tokens, self.losses.num_null_experts
            total.balance_loss = global_balance_loss(
                choices, total.prob_sum, routed_tokens=tokens, num_null_experts=num_null_experts
            )
        return Accumulated(
            total=total,
            local_objective=local_objective,
            choices=choices,
            routing=routing,
            grad_norm=square.sqrt(),
            num_tokens=denominators.routed_tokens,
            experts=experts,
        )

    def apply(self, step: Accumulated, *, lr: float, skip_above: float | None = None) -> StepResult:
        """Clip the gradient and update; skip the update if loss or gradient is not finite, or the loss too high."""
        total, routing = step.total, step.routing
        self.mesh.world.recorder.enter("update")
        # The one wait for the device: the decision depends on these. They are sums over all ranks, so all ranks agree.
        read = read_numbers({**total.numbers(), "grad_norm": step.grad_norm})
        loss, objective, grad_norm = read["loss"], read["objective"], read["grad_norm"]
        not_finite = None
        if not (math.isfinite(objective) and math.isfinite(grad_norm)):
            not_finite = self._describe_not_finite(step)
        skipped = not_finite is not None or (skip_above is not None and loss > skip_above)
        if skipped:
            self._drop_gradients()
        else:
            self._update(lr, grad_norm)
            self.mesh.world.recorder.enter("router update")
            self.optimizer_steps += 1
            if self.average is not None:
                self.average.update(self.optimizer_steps)
            if routing is not None:
                self.previous_counts = step.choices
                # Choices have a column for null experts; under `gshard_first_choice` they are first choices only.
                has_nulls = step.choices.shape != routing.counts.shape
                counts = step.choices if has_nulls else routing.counts
                for layer, moe in zip(self.moe_layers.numbers, self.model.moe_layers(), strict=True):
                    if not is_frozen(moe.router):
                        moe.router.update(counts[layer])
        return StepResult(
            loss=loss,
            balance_loss=read.get("balance_loss"),
            z_loss=read.get("z_loss"),
            extra_losses={name: read[name] for name in total.extra},
            grad_norm=grad_norm,
            skipped=skipped,
            not_finite=not_finite,
            num_tokens=step.num_tokens,
            routing=routing,
            experts=step.experts,
        )

    def eval_loss(
        self, batch: Batch, *, dropless: bool, top_k: int | None = None, return_experts: bool = False
    ) -> EvalSums:
        """Evaluate a batch without gradients and noise."""
        self.mesh.world.recorder.enter("evaluation batch")
        batch = batch.to(self.device)
        options = RoutingOptions(
            dropless=dropless, top_k=top_k, counts_targets_only=True, return_experts=return_experts
        )
        found = EvaluatedBatch()

        def take(output: GPTOutput, batch: Batch, layers: range) -> None:
            found.add(output, MoELayers.of(self.model.config, layers))
            if return_experts:
                found.experts = experts_of(output.moe, batch.tokens.shape)

        self.passes.evaluate([batch], RunLayers(self, options), take)
        routing, experts = found.routing, found.experts
        tokens = batch.target_mask.sum() * self.passes.has_last  # the ranks of a pipeline have the same tokens
        sums = torch.stack([torch.as_tensor(found.loss_sum), tokens])
        sums, *parts = all_reduce_packed([sums, *(routing.tensors() if routing else [])], self.mesh.world)
        routing = routing.with_tensors(parts) if routing else None
        nats, number = sums.tolist()  # waits for the device
        return EvalSums(loss_sum=nats, target_tokens=int(number), routing=routing, experts=experts)

    def _drawn_top_k(self) -> int | None:
        """Return the k drawn for this step, the same on every rank; None: the configured k."""
        among = getattr(self.moe_config.router, "top_k_choices", None) if self.moe_config else None
        if among is None:
            return None
        return among[stable_hash("draw_top_k", self.numerics.seed, self.optimizer_steps) % len(among)]

    def _reduce_sums(
        self, total: StepTotals, choices: Tensor, routing: RoutingSums | None, square: Tensor
    ) -> tuple[StepTotals, Tensor, RoutingSums | None, Tensor]:
        """All-reduce all small sums, in one message."""
        if self.mesh.world.size == 1:
            return total, choices, routing, square
        totals = total.tensors()
        parts = [square, choices, *totals, *(routing.tensors() if routing else [])]
        square, reduced_choices, *rest = all_reduce_packed(parts, self.mesh.world)
        return (
            total.with_tensors(rest[: len(totals)]),
            reduced_choices.to(choices.dtype),
            routing.with_tensors(rest[len(totals) :]) if routing else None,
            square,
        )

    def _describe_not_finite(self, step: Accumulated) -> str:
        """Return a description of the non-finite values, the same on every rank. Collective."""
        mine = self._findings(step.local_objective)
        self.mesh.world.recorder.enter("finding what is not finite")
        findings = [Findings(**found) for found in self.mesh.world.all_gather_objects(asdict(mine))]
        return describe_findings(findings, list(self.parameters), grad_norm=float(step.grad_norm))

    def autocast(self, *, keeps_casts: bool = True) -> contextlib.AbstractContextManager[object]:
        """Return a context in which the model computes in the precision of training."""
        if self.numerics.dtype is not torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=keeps_casts)
