"""Optimizer steps by torch alone.

Everything is summed and divided once: each micro-batch adds its share of the objective, whose denominators were counted
before the first forward pass. No factor of the number of micro-batches or ranks exists anywhere.

# L MoE layers, E experts.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint.state import Slice, TrainState
from trainer.data.batch import Batch
from trainer.engine.base import Engine, EvalSums, RoutingSums, StepResult
from trainer.models.gpt import GPT, GPTOutput, parameter_role
from trainer.moe.losses import Denominators, Objective, choice_counts, global_balance_loss, objective
from trainer.moe.routing import RoutingOptions
from trainer.optim.adamw import build_adamw
from trainer.optim.registry import OptimConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsConfig:
    """What an engine must know of `train` and `seed`."""

    seed: int
    dtype: torch.dtype
    """Of the matrix products; bfloat16 runs under autocast over float32 parameters."""
    grad_clip: float | None


class NativeEngine(Engine):
    """Accumulates, clips and applies gradients in one process."""

    def __init__(self, model: GPT, optim: OptimConfig, numerics: NumericsConfig) -> None:
        self.model, self.numerics = model, numerics
        self.moe_config = model.config.moe
        self.device = model.embedding.weight.device
        self.parameters = dict(model.named_parameters())
        decays = {name: parameter_role(name) not in ("norm", "embedding") for name in self.parameters}
        self.optimizer = build_adamw(
            optim,
            decayed=[p for name, p in self.parameters.items() if decays[name]],
            not_decayed=[p for name, p in self.parameters.items() if not decays[name]],
        )
        self.optimizer_steps = 0
        shape = (len(model.moe_layers()), self.moe_config.num_experts if self.moe_config else 0)
        # Before the first step no load is known, and an even one makes the balance loss its constant minimum.
        self.previous_counts = torch.ones(shape, dtype=torch.int64, device=self.device)

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Take one optimizer step over the micro-batches."""
        batches = [batch.to(self.device) for batch in micro_batches]
        denominators = Denominators(
            target_tokens=max(1, sum(int(batch.target_mask.sum()) for batch in batches)),
            routed_tokens=max(1, sum(int(batch.valid.sum()) for batch in batches)),
        )
        options = RoutingOptions(noise_seed=self.numerics.seed)
        counts = self._counts_before(batches, options)
        running = torch.zeros_like(self.previous_counts)
        total, routing, choices = _Totals(), None, running
        for batch in batches:
            with self._autocast():
                output = self.model(batch, options)
            here = self._choices(output)
            choices = choices + here
            share = objective(
                output.loss_sum,
                output.moe,
                global_counts=choices if self._is_running() else counts,
                denominators=denominators,
                config=self.moe_config,
            )
            share.total.backward()
            total.add(share, output)
            sums = routing_sums(output)
            routing = sums if routing is None or sums is None else routing + sums
        if counts is None and total.prob_sum is not None and self._is_logged_only():
            total.balance_loss = global_balance_loss(choices, total.prob_sum, routed_tokens=denominators.routed_tokens)
        grad_norm, skipped = self._apply_gradients(lr)
        if not skipped and routing is not None:
            self.previous_counts = choices
            for layer, moe in enumerate(self.model.moe_layers()):
                moe.router.update(routing.counts[layer])
        return StepResult(
            loss=float(total.loss),
            balance_loss=None if total.balance_loss is None else float(total.balance_loss),
            z_loss=None if total.z_loss is None else float(total.z_loss),
            grad_norm=grad_norm,
            skipped=skipped,
            num_tokens=denominators.routed_tokens,
            routing=routing,
        )

    def eval_loss(self, batch: Batch, *, dropless: bool) -> EvalSums:
        """Evaluate a batch without gradients and without noise."""
        batch = batch.to(self.device)
        with torch.no_grad(), self._autocast():
            output = self.model(batch, RoutingOptions(dropless=dropless))
        return EvalSums(
            loss_sum=float(output.row_loss.double().sum()),
            target_tokens=int(batch.target_mask.sum()),
            routing=routing_sums(output),
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
            slices={name: Slice.whole(tensor) for name, tensor in tensors.items()},
            values={"optimizer_steps": self.optimizer_steps},
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

    def _apply_gradients(self, lr: float) -> tuple[float, bool]:
        """Clip and step, unless the gradient is not finite; return its norm and whether the step was skipped."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        grad_norm = float(norm)  # waits for the device: the decision to step hangs on it
        finite = torch.isfinite(norm).item()
        if finite:
            clip = self.numerics.grad_clip
            if clip is not None and grad_norm > clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), clip, norm, foreach=True)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.optimizer_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, not finite

    def _counts_before(self, batches: Sequence[Batch], options: RoutingOptions) -> Tensor | None:
        """Return the (L, E) counts of the whole step that make up f, or None where each micro-batch's own will do."""
        if self.moe_config is None or self.moe_config.balance.scope != "global_batch":
            return None
        match self.moe_config.balance.counts:
            case "previous_step":
                return self.previous_counts
            case "exact" if len(batches) > 1 and self.moe_config.balance.coef > 0:
                with torch.no_grad(), self._autocast():
                    return torch.stack([self._choices(self.model(batch, options)) for batch in batches]).sum(0)
            case _:
                return None

    def _is_logged_only(self) -> bool:
        """Tell whether the exact global balance loss is wanted for the log alone."""
        balance = self.moe_config.balance if self.moe_config else None
        return (
            balance is not None and (balance.scope, balance.counts) == ("global_batch", "exact") and balance.coef == 0
        )

    def _is_running(self) -> bool:
        balance = self.moe_config.balance if self.moe_config else None
        return balance is not None and balance.scope == "global_batch" and balance.counts == "running"

    def _choices(self, output: GPTOutput) -> Tensor:
        """Return (L, E): a micro-batch's counts under the configured convention."""
        if self.moe_config is None or not output.moe:
            return torch.zeros_like(self.previous_counts)
        return torch.stack([choice_counts(stats, self.moe_config.balance).sum(0) for stats in output.moe])

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.numerics.dtype is not torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@dataclass(slots=True)
class _Totals:
    """Sums of a step's shares, kept as tensors until its end."""

    loss: Tensor | float = 0.0
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    prob_sum: Tensor | None = None
    """(L, E) router probabilities over all rows."""

    def add(self, share: Objective, output: GPTOutput) -> None:
        self.loss = self.loss + share.loss
        if share.balance_loss is not None:
            self.balance_loss = share.balance_loss + (0 if self.balance_loss is None else self.balance_loss)
            layers = [stats.prob_sum.detach().sum(0) for stats in output.moe if stats.prob_sum is not None]
            self.prob_sum = torch.stack(layers) + (0 if self.prob_sum is None else self.prob_sum)
        if share.z_loss is not None:
            self.z_loss = share.z_loss + (0 if self.z_loss is None else self.z_loss)


def routing_sums(output: GPTOutput) -> RoutingSums | None:
    """Add up the rows of a micro-batch; None for a dense model."""
    if not output.moe:
        return None
    entropies = [stats.entropy_sum.sum() for stats in output.moe if stats.entropy_sum is not None]
    return RoutingSums(
        counts=torch.stack([stats.counts.sum(0) for stats in output.moe]),
        dropped=torch.stack([stats.dropped.sum() for stats in output.moe]),
        tokens=torch.stack([stats.tokens.sum() for stats in output.moe]),
        entropy_sum=torch.stack(entropies) if entropies else None,
    )
