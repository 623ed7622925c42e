"""Optimizer steps, as every engine takes them: what is computed and summed, and whether the step is taken.

Everything is summed and divided once: each micro-batch adds its share of the objective, whose denominators were counted
before the first forward pass. No factor of the number of micro-batches or ranks exists anywhere.

# L MoE layers, E experts.
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from trainer.checkpoint.state import Slice, TrainState
from trainer.data.batches.batch import Batch
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine, EvalSums, RoutingSums, StepResult
from trainer.engine.global_stats import GlobalStats
from trainer.engine.nonfinite import Findings, in_words
from trainer.engine.reduce import (
    StepTotals,
    all_reduce_packed,
    routing_like,
    routing_sums,
    routing_tensors,
)
from trainer.models.gpt import GPT, GPTOutput
from trainer.models.initialize import expert_parameters
from trainer.moe.balance import global_balance_loss
from trainer.moe.losses import Denominators, objective
from trainer.moe.routing import RoutingOptions
from trainer.ops.noise import stable_hash
from trainer.parallel.shard import first_row, local


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsConfig:
    """Options of a step, from `train` and `seed`."""

    seed: int
    dtype: torch.dtype
    """Dtype of matrix products; bfloat16 runs under autocast over float32 parameters."""
    grad_clip: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulated:
    """A step between its last backward pass and its update; sums are over all ranks."""

    total: StepTotals
    own_objective: Tensor
    """This rank's share of the objective."""
    choices: Tensor
    """(L, E) what the balance loss counts; (L, E + 1) with null experts."""
    routing: RoutingSums | None
    grad_norm: Tensor
    """2-norm of the whole gradient, float64: each weight once, whoever holds it."""
    num_tokens: int


class StepEngine(Engine):
    """Runs the micro-batches, sums what is small, and decides; where gradients are is each engine's own business.

    A new engine defines the methods below `# What an engine does`.
    """

    def __init__(self, model: GPT, numerics: NumericsConfig, mesh: Mesh) -> None:
        self.model, self.numerics, self.mesh = model, numerics, mesh
        self.moe_config = model.config.moe
        self.device = model.embedding.weight.device
        self.parameters = dict(model.named_parameters())
        self.first_expert = expert_parameters(model)
        self.optimizer_steps = 0
        self.known = GlobalStats(self.moe_config, mesh.world)
        moe = self.moe_config
        columns = 0 if moe is None else moe.num_experts + (moe.router.num_null_experts > 0)
        shape = (len(model.moe_layers()), columns)
        # Before the first step no load is known, and an even one makes the balance loss its constant minimum.
        self.previous_counts = torch.ones(shape, dtype=torch.int64, device=self.device)

    # What an engine does with gradients and moments

    @abstractmethod
    def gradients(self) -> TrainState:
        """Return the gradients of the whole step, not clipped, by the names of their parameters."""

    @abstractmethod
    def _backward(self, objective: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a micro-batch's share of the objective; after the last one sums over ranks can begin."""

    @abstractmethod
    def _sum_gradients(self) -> Tensor:
        """Finish adding up gradients over ranks; return this rank's part of the squared norm, float64."""

    @abstractmethod
    def _update(self, lr: float, grad_norm: float) -> None:
        """Clip, step, and let go of the gradient."""

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Let go of the gradient of a step that is not taken."""

    @abstractmethod
    def _findings(self, own_objective: Tensor) -> Findings:
        """Look for what is not finite on this rank."""

    @abstractmethod
    def _moments(self) -> dict[str, Slice]:
        """Return the optimizer's moments, by name. Every rank must call it."""

    @abstractmethod
    def _load_moments(self, state: TrainState) -> None:
        """Take over the moments of a state, behind its weights and the number of its steps."""

    # What every engine does

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float, skip_above: float | None = None) -> StepResult:
        """Take one optimizer step over the micro-batches."""
        return self.apply(self.accumulate(micro_batches), lr=lr, skip_above=skip_above)

    def accumulate(self, micro_batches: Sequence[Batch]) -> Accumulated:
        """Run the micro-batches forward and backward.

        The gradient of the whole step is summed over ranks afterwards, and not clipped yet.
        """
        recorder = self.mesh.world.recorder
        recorder.enter("counting")
        batches = [batch.to(self.device) for batch in micro_batches]
        denominators = self._denominators(batches)
        options = RoutingOptions(noise_seed=self.numerics.seed, top_k=self._drawn_top_k())
        before = self.known.before(batches, lambda batch: self._forward(batch, options))
        total, routing, choices = StepTotals(), None, torch.zeros_like(self.previous_counts)
        for batch in batches:
            recorder.enter("forward")
            output = self._forward(batch, options)
            here = self.known.own(output)
            if here is not None:
                choices = choices + here.counts
            share = objective(
                output.loss_sum,
                output.moe,
                known=self.known.of_step(before, here, choices=choices, previous_counts=self.previous_counts),
                denominators=denominators,
                config=self.moe_config,
            )
            recorder.enter("backward")
            self._backward(share.total, is_last=batch is batches[-1])
            total.add(share, output)
            sums = routing_sums(output)
            routing = sums if routing is None or sums is None else routing + sums
        recorder.enter("gradient sums")
        square, own_objective = self._sum_gradients(), torch.as_tensor(total.objective)
        total, choices, routing, square = self._sum_small(total, choices, routing, square)
        if self.known.is_balance_only_logged and total.prob_sum is not None:
            assert self.moe_config is not None, "probabilities are of routers"
            total.balance_loss = global_balance_loss(
                choices, total.prob_sum, routed_tokens=denominators.routed_tokens, config=self.moe_config
            )
        return Accumulated(
            total=total,
            own_objective=own_objective,
            choices=choices,
            routing=routing,
            grad_norm=square.sqrt(),
            num_tokens=denominators.routed_tokens,
        )

    def apply(self, step: Accumulated, *, lr: float, skip_above: float | None = None) -> StepResult:
        """Clip the gradient and step; skip the step if loss or gradient is not finite, or the loss too high."""
        total, routing = step.total, step.routing
        self.mesh.world.recorder.enter("update")
        # Waits for the device: the decision to step hangs on these. They are sums over all ranks, and so is it.
        loss, objective, grad_norm = float(total.loss), float(total.objective), float(step.grad_norm)
        not_finite = None
        if not (math.isfinite(objective) and math.isfinite(grad_norm)):
            not_finite = self._what_is_not_finite(step)
        skipped = not_finite is not None or (skip_above is not None and loss > skip_above)
        if skipped:
            self._drop_gradients()
        else:
            self._update(lr, grad_norm)
            self.mesh.world.recorder.enter("router update")
            self.optimizer_steps += 1
            if routing is not None:
                self.previous_counts = step.choices
                # Choices have a column for null experts; under some conventions they are of first choices only.
                has_nulls = step.choices.shape != routing.counts.shape
                counts = step.choices if has_nulls else routing.counts
                for layer, moe in enumerate(self.model.moe_layers()):
                    moe.router.update(counts[layer])
        return StepResult(
            loss=loss,
            balance_loss=None if total.balance_loss is None else float(total.balance_loss),
            z_loss=None if total.z_loss is None else float(total.z_loss),
            extra_losses={name: float(value) for name, value in total.extra.items()},
            grad_norm=grad_norm,
            skipped=skipped,
            not_finite=not_finite,
            num_tokens=step.num_tokens,
            routing=routing,
        )

    def eval_loss(self, batch: Batch, *, dropless: bool, top_k: int | None = None) -> EvalSums:
        """Evaluate a batch without gradients and without noise."""
        self.mesh.world.recorder.enter("evaluation batch")
        batch = batch.to(self.device)
        options = RoutingOptions(dropless=dropless, top_k=top_k, counts_targets_only=True)
        with torch.no_grad():
            output = self._forward(batch, options)
        routing = routing_sums(output)
        here = torch.stack([output.row_loss.double().sum(), batch.target_mask.sum().double()])
        parts = [here] if routing is None else [here, *routing_tensors(routing)]
        here, *parts = all_reduce_packed(parts, self.mesh.world)
        return EvalSums(
            loss_sum=float(here[0]),
            target_tokens=int(here[1]),
            routing=None if routing is None else routing_like(routing, parts),
        )

    def state(self) -> TrainState:
        """Return weights, buffers, counters and moments, by name. Every rank must call it."""
        return self._with_moments(self._moments())

    @torch.no_grad()
    def load_state(self, state: TrainState) -> None:
        """Copy a state, of the parts that `wanted` names, into weights, buffers, counters and moments."""
        self.optimizer_steps = int(state.values["optimizer_steps"])
        for name, mine in self._but_moments().items():
            mine.tensor.copy_(state.slices[name].tensor)
        self._load_moments(state)

    def _with_moments(self, moments: Mapping[str, Slice]) -> TrainState:
        values = {"optimizer_steps": self.optimizer_steps}
        return TrainState(slices={**self._but_moments(), **moments}, values=values)

    def _but_moments(self) -> dict[str, Slice]:
        """Return weights, buffers and counters: no engine cuts them in a way of its own."""
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"model.{name}": b for name, b in self.model.named_buffers()}
        tensors["engine.previous_counts"] = self.previous_counts
        return {name: self._slice(name, tensor) for name, tensor in tensors.items()}

    def _slice(self, name: str, tensor: Tensor) -> Slice:
        """Say which part of the global tensor this rank has: its own experts, and a piece of what is sharded."""
        parameter = name.partition(".")[2] if name.startswith("model.") else name.split(".", 2)[-1]
        first, shape = self.first_expert.get(parameter), tuple(tensor.shape)
        if first is not None and self.moe_config is not None:
            shape = (self.moe_config.num_experts, *shape[1:])
        return Slice(
            tensor=local(tensor),
            global_shape=shape,
            start=(first or 0) + first_row(tensor),
            is_of_experts=first is not None,
        )

    def _forward(self, batch: Batch, options: RoutingOptions) -> GPTOutput:
        with self.autocast():
            return self.model(batch, options)

    def _drawn_top_k(self) -> int | None:
        """Return the experts per token that this step draws, the same on every rank; None: the configured number."""
        among = getattr(self.moe_config.router, "top_k_choices", None) if self.moe_config else None
        if among is None:
            return None
        return among[stable_hash("draw_top_k", self.numerics.seed, self.optimizer_steps) % len(among)]

    def _denominators(self, batches: Sequence[Batch]) -> Denominators:
        """Count target and routed tokens of the whole step, over all ranks, before its first forward pass."""
        counts = torch.tensor([[int(b.target_mask.sum()), int(b.valid.sum())] for b in batches], device=self.device)
        target_tokens, routed_tokens = self.mesh.world.all_reduce_(counts.sum(0)).tolist()
        return Denominators(target_tokens=max(1, target_tokens), routed_tokens=max(1, routed_tokens))

    def _sum_small(
        self, total: StepTotals, choices: Tensor, routing: RoutingSums | None, square: Tensor
    ) -> tuple[StepTotals, Tensor, RoutingSums | None, Tensor]:
        """Add up everything that is small over all ranks, in one message."""
        if self.mesh.world.size == 1:
            return total, choices, routing, square
        parts = [square, choices, *total.tensors()]
        routed = [] if routing is None else routing_tensors(routing)
        square, choices_sum, *rest = all_reduce_packed([*parts, *routed], self.mesh.world)
        num_totals = len(parts) - 2
        return (
            total.replaced(rest[:num_totals]),
            choices_sum.to(choices.dtype),
            None if routing is None else routing_like(routing, rest[num_totals:]),
            square,
        )

    def _what_is_not_finite(self, step: Accumulated) -> str:
        """Say it in words, the same ones on every rank, which must all call it."""
        mine = self._findings(step.own_objective)
        self.mesh.world.recorder.enter("finding what is not finite")
        everyone = [Findings(**found) for found in self.mesh.world.all_gather_objects(asdict(mine))]
        return in_words(everyone, list(self.parameters), grad_norm=float(step.grad_norm))

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which the model computes in the precision of training."""
        if self.numerics.dtype is not torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
