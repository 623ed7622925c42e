"""Optimizer steps by torch alone.

Everything is summed and divided once: each micro-batch adds its share of the objective, whose denominators were counted
before the first forward pass. No factor of the number of micro-batches or ranks exists anywhere.

# L MoE layers, E experts.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer import faults
from trainer.checkpoint.state import Slice, TrainState
from trainer.data.batch import Batch
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine, EvalSums, RoutingSums, StepResult
from trainer.engine.nonfinite import Findings, in_words, is_finite
from trainer.engine.sums import (
    StepTotals,
    routing_like,
    routing_sums,
    routing_tensors,
    square_norm,
    sum_together,
)
from trainer.models.gpt import GPT, GPTOutput, parameter_role
from trainer.models.initialize import expert_parameters
from trainer.moe.losses import Denominators, choice_counts, global_balance_loss, objective
from trainer.moe.routing import RoutingOptions
from trainer.optim.adamw import build_adamw
from trainer.optim.registry import OptimConfig
from trainer.parallel.replicate import GradientSum
from trainer.parallel.shard import first_row, is_cut, local

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsConfig:
    """What an engine must know of `train` and `seed`."""

    seed: int
    dtype: torch.dtype
    """Of the matrix products; bfloat16 runs under autocast over float32 parameters."""
    grad_clip: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulated:
    """A step between its last backward pass and its update; sums are over all ranks."""

    total: StepTotals
    own_objective: Tensor
    """This rank's share of the objective."""
    choices: Tensor
    """(L, E) what the balance loss counts."""
    routing: RoutingSums | None
    grad_norm: Tensor
    """2-norm of the whole gradient, float64: each weight once, whoever holds it."""
    num_tokens: int


class NativeEngine(Engine):
    """Accumulates, reduces, clips and applies gradients."""

    def __init__(self, model: GPT, optim: OptimConfig, numerics: NumericsConfig, mesh: Mesh | None = None) -> None:
        self.model, self.numerics = model, numerics
        self.mesh = Mesh.of_one() if mesh is None else mesh
        self.moe_config = model.config.moe
        self.device = model.embedding.weight.device
        self.parameters = dict(model.named_parameters())
        self.first_expert = expert_parameters(model)
        decays = {name: parameter_role(name) not in ("norm", "embedding") for name in self.parameters}
        self.optimizer = build_adamw(
            optim,
            decayed=[p for name, p in self.parameters.items() if decays[name]],
            not_decayed=[p for name, p in self.parameters.items() if not decays[name]],
        )
        self._dense = [p for name, p in self.parameters.items() if name not in self.first_expert]
        self._experts = [self.parameters[name] for name in self.first_expert]
        self.gradient_sums = [
            GradientSum([p for p in parameters if not is_cut(p)], group)
            for parameters, group in ((self._dense, self.mesh.world), (self._experts, self.mesh.edp))
        ]
        self.optimizer_steps = 0
        shape = (len(model.moe_layers()), self.moe_config.num_experts if self.moe_config else 0)
        # Before the first step no load is known, and an even one makes the balance loss its constant minimum.
        self.previous_counts = torch.ones(shape, dtype=torch.int64, device=self.device)

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float, skip_above: float | None = None) -> StepResult:
        """Take one optimizer step over the micro-batches."""
        return self.apply(self.accumulate(micro_batches), lr=lr, skip_above=skip_above)

    def accumulate(self, micro_batches: Sequence[Batch]) -> Accumulated:
        """Run the micro-batches forward and backward.

        The gradient of the whole step, summed over ranks and not clipped, is in `.grad` afterwards.
        """
        journal = self.mesh.world.journal
        journal.enter("counting")
        batches = [batch.to(self.device) for batch in micro_batches]
        denominators = self._denominators(batches)
        options = RoutingOptions(noise_seed=self.numerics.seed)
        counts = self._counts_before(batches, options)
        total, routing, choices = StepTotals(), None, torch.zeros_like(self.previous_counts)
        for batch in batches:
            journal.enter("forward")
            with self.autocast():
                output = self.model(batch, options)
            here = self._choices(output)
            choices = choices + here
            if self._global_counts == "running":
                counts = choices
            elif counts is None and self._global_counts == "exact" and self._has_balance_loss:
                counts = self.mesh.world.sum_(here.clone())  # the only micro-batch: known now
            share = objective(
                output.loss_sum,
                output.moe,
                global_counts=counts,
                denominators=denominators,
                config=self.moe_config,
            )
            journal.enter("backward")
            if batch is batches[-1]:
                for gradient_sum in self.gradient_sums:
                    gradient_sum.expect()
            share.total.backward()
            total.add(share, output)
            sums = routing_sums(output)
            routing = sums if routing is None or sums is None else routing + sums
        journal.enter("gradient sums")
        square, own_objective = self._sum_gradients(), torch.as_tensor(total.objective)
        total, choices, routing, square = self._sum_small(total, choices, routing, square)
        if self._global_counts == "exact" and not self._has_balance_loss and total.prob_sum is not None:
            total.balance_loss = global_balance_loss(choices, total.prob_sum, routed_tokens=denominators.routed_tokens)
        return Accumulated(
            total=total,
            own_objective=own_objective,
            choices=choices,
            routing=routing,
            grad_norm=square.sqrt(),
            num_tokens=denominators.routed_tokens,
        )

    def apply(self, step: Accumulated, *, lr: float, skip_above: float | None = None) -> StepResult:
        """Clip the gradient in `.grad` and step; skip it if loss or gradient is not finite, or the loss too high."""
        total, routing = step.total, step.routing
        self.mesh.world.journal.enter("update")
        # Waits for the device: the decision to step hangs on these. They are sums over all ranks, and so is it.
        loss, objective, grad_norm = float(total.loss), float(total.objective), float(step.grad_norm)
        not_finite = None
        if not (math.isfinite(objective) and math.isfinite(grad_norm)):
            not_finite = self._what_is_not_finite(step)
        skipped = not_finite is not None or (skip_above is not None and loss > skip_above)
        if not skipped:
            self._update(lr, grad_norm)
            if routing is not None:
                self.previous_counts = step.choices
                for layer, moe in enumerate(self.model.moe_layers()):
                    moe.router.update(routing.counts[layer])
        self.optimizer.zero_grad(set_to_none=True)
        faults.hit("step.updated")
        return StepResult(
            loss=loss,
            balance_loss=None if total.balance_loss is None else float(total.balance_loss),
            z_loss=None if total.z_loss is None else float(total.z_loss),
            grad_norm=grad_norm,
            skipped=skipped,
            not_finite=not_finite,
            num_tokens=step.num_tokens,
            routing=routing,
        )

    def eval_loss(self, batch: Batch, *, dropless: bool) -> EvalSums:
        """Evaluate a batch without gradients and without noise."""
        batch = batch.to(self.device)
        with torch.no_grad(), self.autocast():
            output = self.model(batch, RoutingOptions(dropless=dropless))
        routing = routing_sums(output)
        here = torch.stack([output.row_loss.double().sum(), batch.target_mask.sum().double()])
        parts = [here] if routing is None else [here, *routing_tensors(routing)]
        here, *parts = sum_together(parts, self.mesh.world)
        return EvalSums(
            loss_sum=float(here[0]),
            target_tokens=int(here[1]),
            routing=None if routing is None else routing_like(routing, parts),
        )

    def state(self) -> TrainState:
        """Return weights, buffers, moments and counters, by name."""
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"model.{name}": b for name, b in self.model.named_buffers()}
        for name, p in self.parameters.items():
            moments = self._moments(p)
            tensors |= {f"optim.{key}.{name}": moments[key] for key in _MOMENTS}
        tensors["engine.previous_counts"] = self.previous_counts
        return TrainState(
            slices={name: self._slice(name, tensor) for name, tensor in tensors.items()},
            values={"optimizer_steps": self.optimizer_steps},
        )

    def gradients(self) -> TrainState:
        """Return the gradients by the names of their parameters; zeros where there is none."""
        return TrainState(
            slices={
                name: self._slice(f"model.{name}", torch.zeros_like(p) if p.grad is None else p.grad)
                for name, p in self.parameters.items()
            }
        )

    def _slice(self, name: str, tensor: Tensor) -> Slice:
        """Say which part of the global tensor this rank has: its own experts, and a piece of what is cut over ranks."""
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

    @torch.no_grad()
    def load_state(self, state: TrainState) -> None:
        """Copy a state into weights, buffers, moments and counters."""
        self.optimizer_steps = int(state.values["optimizer_steps"])
        for name, mine in self.state().slices.items():
            mine.tensor.copy_(state.slices[name].tensor)
        for p in self.parameters.values():
            self._moments(p)["step"].fill_(self.optimizer_steps)

    def _moments(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """Return AdamW's state of a parameter, made as torch makes it if there was no step yet."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in _MOMENTS:
                state[key] = torch.zeros_like(parameter)
        return state

    def _denominators(self, batches: Sequence[Batch]) -> Denominators:
        """Count target and routed tokens of the whole step, over all ranks, before its first forward pass."""
        counts = torch.tensor([[int(b.target_mask.sum()), int(b.valid.sum())] for b in batches], device=self.device)
        target_tokens, routed_tokens = self.mesh.world.sum_(counts.sum(0)).tolist()
        return Denominators(target_tokens=max(1, target_tokens), routed_tokens=max(1, routed_tokens))

    def _sum_gradients(self) -> Tensor:
        """Finish adding up gradients over ranks with the same weights; return this rank's part of the squared norm.

        A rank that owns an expert has the sum over its ep peers' tokens already, through the way back of the rows. What
        is cut over ranks was summed by FSDP.
        """
        for gradient_sum in self.gradient_sums:
            gradient_sum.finish()
        layout, square = self.mesh.layout, torch.zeros((), dtype=torch.float64, device=self.device)
        for mine, is_first in ((self._dense, layout.rank == 0), (self._experts, layout.edp_rank == 0)):
            counted = mine if is_first else [p for p in mine if is_cut(p)]  # of copies, the first one
            square = square + square_norm([local(p.grad) for p in counted if p.grad is not None]).to(self.device)
        return square

    def _sum_small(
        self, total: StepTotals, choices: Tensor, routing: RoutingSums | None, square: Tensor
    ) -> tuple[StepTotals, Tensor, RoutingSums | None, Tensor]:
        """Add up everything that is small over all ranks, in one message."""
        if self.mesh.world.size == 1:
            return total, choices, routing, square
        parts = [square, choices, *total.tensors()]
        routed = [] if routing is None else routing_tensors(routing)
        square, choices_sum, *rest = sum_together([*parts, *routed], self.mesh.world)
        num_totals = len(parts) - 2
        return (
            total.replaced(rest[:num_totals]),
            choices_sum.to(choices.dtype),
            None if routing is None else routing_like(routing, rest[num_totals:]),
            square,
        )

    def _update(self, lr: float, grad_norm: float) -> None:
        """Clip and step."""
        clip = self.numerics.grad_clip
        if clip is not None and grad_norm > clip:
            gradients = [local(p.grad) for p in self.parameters.values() if p.grad is not None]
            torch._foreach_mul_(gradients, clip / (grad_norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        faults.hit("step.weights_updated")
        self.optimizer_steps += 1

    def _what_is_not_finite(self, step: Accumulated) -> str:
        """Say it in words, the same ones on every rank, which must all call it."""
        dense, experts = (gradient_sum.own_is_finite for gradient_sum in self.gradient_sums)
        mine = Findings(
            gradients=[n for n, p in self.parameters.items() if p.grad is not None and not is_finite(local(p.grad))],
            loss_is_finite=is_finite(step.own_objective),
            dense_share_is_finite=dense,
            expert_share_is_finite=experts,
        )
        self.mesh.world.journal.enter("finding what is not finite")
        everyone = self.mesh.world.gather_objects(mine)
        return in_words(everyone, list(self.parameters), grad_norm=float(step.grad_norm))

    @property
    def _global_counts(self) -> Literal["exact", "previous_step", "running"] | None:
        """Where the counts of a balance loss over the global batch come from; None for another scope or no MoE."""
        balance = self.moe_config.balance if self.moe_config else None
        return balance.counts if balance is not None and balance.scope == "global_batch" else None

    @property
    def _has_balance_loss(self) -> bool:
        return self.moe_config is not None and self.moe_config.balance.coef > 0

    def _counts_before(self, batches: Sequence[Batch], options: RoutingOptions) -> Tensor | None:
        """Return the (L, E) counts of the whole step that make up f, or None where each micro-batch's own will do."""
        match self._global_counts:
            case "previous_step":
                return self.previous_counts
            case "exact" if len(batches) > 1 and self._has_balance_loss:
                with torch.no_grad(), self.autocast():
                    here = torch.stack([self._choices(self.model(batch, options)) for batch in batches]).sum(0)
                return self.mesh.world.sum_(here)
            case _:
                return None

    def _choices(self, output: GPTOutput) -> Tensor:
        """Return (L, E): a micro-batch's counts under the configured convention."""
        if self.moe_config is None or not output.moe:
            return torch.zeros_like(self.previous_counts)
        return torch.stack([choice_counts(stats, self.moe_config.balance).sum(0) for stats in output.moe])

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which the model computes in the precision of training."""
        if self.numerics.dtype is not torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
