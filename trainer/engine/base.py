"""Engine interface, and the state that all engines share.

# L MoE layers, E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.checkpoint.coverage import AVERAGE, WEIGHT
from trainer.checkpoint.state import Slice, TrainState
from trainer.data.batches.batch import Batch
from trainer.engine.state_slices import StateSlices
from trainer.engine.weight_average import WeightAverage
from trainer.models.gpt import GPT
from trainer.moe.stats import MoEStats
from trainer.ops.tensor_sums import TensorSums

COUNTS = "engine.previous_counts"
"""Name in a state of the assignments to each expert in the last step, by MoE layer."""
SINCE = "moments_since."
"""Prefix of a parameter, among the values of a state: optimizer steps before the first one of its moments."""


UPDATES = "ema.updates"
"""Name among the values of a state of how often the moving average was updated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSums(TensorSums):
    """Routing statistics of all MoE layers, summed over rows."""

    counts: Tensor
    """(L, E) int64 assignments before drops."""
    dropped: Tensor
    """(L,) int64 assignments over capacity."""
    tokens: Tensor
    """(L,) int64 valid tokens."""
    entropy_sum: Tensor | None
    """(L,) entropy of the router probabilities, in nats; None if the router has none."""
    replaced: Tensor | None = None
    """(L,) int64 given experts that the router would not have chosen; None, like those below: none were given."""
    replaced_tokens: Tensor | None = None
    """(L,) int64 tokens with such an expert."""
    replaced_somewhere: Tensor | None = None
    """(1,) int64 tokens with such an expert in any layer."""
    missed_mass: Tensor | None = None
    """(L,) share of the scores that the router's choice has and the given experts have not."""
    router_squares: Tensor | None = None
    """(L,) squared norms of the routers' gradients in float64, NaN for frozen ones; None: not measured."""
    prob_sum: Tensor | None = None
    """(L, E) router probabilities, or (L, E + 1) with null experts; None if the router has none."""

    @classmethod
    def of(cls, moe: Sequence[MoEStats]) -> "RoutingSums | None":
        """Sum over the rows of a micro-batch; None for a dense model."""
        if not moe:
            return None
        entropies = [stats.entropy_sum.sum() for stats in moe if stats.entropy_sum is not None]
        missed = [stats.missed_mass.sum() for stats in moe if stats.missed_mass is not None]
        replaced = [stats.replaced for stats in moe if stats.replaced is not None]
        by_token = torch.stack(replaced) if replaced else None  # (L, T)
        return cls(
            counts=torch.stack([stats.counts.sum(0) for stats in moe]),
            dropped=torch.stack([stats.dropped.sum() for stats in moe]),
            tokens=torch.stack([stats.tokens.sum() for stats in moe]),
            entropy_sum=torch.stack(entropies) if entropies else None,
            replaced=None if by_token is None else by_token.sum(1),
            replaced_tokens=None if by_token is None else (by_token > 0).sum(1),
            replaced_somewhere=None if by_token is None else (by_token > 0).any(0).sum()[None],
            missed_mass=torch.stack(missed) if missed else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Result of one optimizer step, over all ranks and micro-batches."""

    loss: float
    """Cross-entropy in nats per target token."""
    balance_loss: float | None
    """Per routed token and MoE layer, without coefficient: 1 if balanced."""
    z_loss: float | None
    grad_norm: float
    """2-norm of the whole gradient before clipping."""
    skipped: bool
    """True if the update was skipped, because of a value that is not finite or a loss above the limit."""
    not_finite: str | None
    """Description of the non-finite loss or gradient that caused the skip."""
    num_tokens: int
    """Valid tokens in the global batch."""
    routing: RoutingSums | None
    """None for a dense model."""
    extra_losses: dict[str, float] = field(default_factory=dict)
    """The other losses that are on, by name, in the same units: without coefficient, except `router`."""
    experts: Sequence[Tensor] = ()
    """(B, S, L, k) int32 experts of this rank's tokens before drops, of each micro-batch, if requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSums:
    """Sums over evaluation batches."""

    loss_sum: float
    """Cross-entropy in nats."""
    target_tokens: int
    routing: RoutingSums | None
    """Routing statistics of the target tokens."""
    experts: Tensor | None = None
    """(B, S, L, k) int32 experts of one batch's tokens, if requested; sums of several have none."""

    def __add__(self, other: "EvalSums") -> "EvalSums":
        """Add the sums of two disjoint sets of rows."""
        routing = None if self.routing is None or other.routing is None else self.routing + other.routing
        loss_sum, target_tokens = self.loss_sum + other.loss_sum, self.target_tokens + other.target_tokens
        return EvalSums(loss_sum=loss_sum, target_tokens=target_tokens, routing=routing)


class Engine(ABC):
    """Performs optimizer steps. Owns the gradients: accumulation, reduction, clipping, update.

    Its state is saved and loaded as slices of global tensors, by name; only the layout of the optimizer's moments is
    the business of each engine.
    """

    def __init__(self, model: GPT) -> None:
        self.model, self.moe_config = model, model.config.moe
        self.device = model.device
        self.parameters = dict(model.named_parameters())
        self.learning = {name: p for name, p in self.parameters.items() if p.requires_grad}
        """Parameters that are not frozen."""
        self.slices = StateSlices(model)
        """Which slices of global tensors this rank holds."""
        self.expert_numbers, self.cut_parameters = self.slices.expert_numbers, self.slices.cut_parameters
        self.optimizer_steps = 0
        self.moments_since: dict[str, int] = {}
        """Optimizer steps before the first one of a parameter's moments, where there were some: it was frozen then."""
        self.average: WeightAverage | None = None
        """Moving average of the weights; None: none."""
        self.repeated_steps = 0
        """Steps, in this process, that were taken again since their rows exceeded `row_budget`."""
        moe = self.moe_config
        columns = 0 if moe is None else moe.num_experts + (moe.router.num_null_experts > 0)
        shape = (len(model.config.moe_layers), columns)
        # There is no load before the first step; a uniform one makes the balance loss its constant minimum.
        self.previous_counts = torch.ones(shape, dtype=torch.int64, device=self.device)

    @abstractmethod
    def train_step(
        self,
        micro_batches: Sequence[Batch],
        *,
        lr: float,
        skip_above: float | None = None,
        return_experts: bool = False,
        with_router_norms: bool = True,
    ) -> StepResult:
        """Take one optimizer step over the global batch that the micro-batches form.

        All ranks skip the update if loss or gradient is not finite, or if the loss exceeds `skip_above`. With
        `return_experts`, the router has a fixed k. `with_router_norms` measures each router's gradient, for a log.
        """

    @abstractmethod
    def eval_loss(
        self, batch: Batch, *, dropless: bool, top_k: int | None = None, return_experts: bool = False
    ) -> EvalSums:
        """Evaluate a batch of this rank without gradients and noise; `dropless` ignores the capacity.

        `top_k` overrides the experts per token of the config; `return_experts` needs a router with a fixed k.
        """

    @abstractmethod
    def autocast(self) -> AbstractContextManager[object]:
        """Return a context in which the model computes in the precision of training."""

    def state(self) -> TrainState:
        """Return everything the next step depends on, by name. Collective: every rank must call it."""
        return self._with_moments(self._moments())

    @torch.no_grad()
    def load_state(self, state: TrainState) -> None:
        """Load the slices that `wanted` names. Not collective, so that a read may fail on one rank alone.

        A parameter that learns now and was frozen in the state starts with moments of zero and no steps.
        """
        self.optimizer_steps = int(state.values["optimizer_steps"])
        since = {name: int(state.values.get(f"{SINCE}{name}", 0)) for name in self.learning}
        fresh = set()
        for name, tensor in {**self._tensors(), **self._averages()}.items():
            part = state.slices[name]
            self.slices.copy(name, tensor, part.tensor)
            if part.is_frozen and (parameter := name.removeprefix(WEIGHT)) in self.learning:
                fresh.add(parameter)
                since[parameter] = self.optimizer_steps
        self.moments_since = {name: steps for name, steps in since.items() if steps}
        if self.average is not None:
            self.average.num_updates = int(state.values.get(UPDATES, 0))
        self._load_moments(state, fresh)

    def held(self) -> TrainState:
        """Return the state as this rank holds it, to compare copies: `state` may have to move tensors first.

        Copies have the same `start`, but it is not a row of every tensor.
        """
        return self.state()

    def wanted(self) -> TrainState:
        """Return the slices of tensors that `load_state` expects; only their positions and shapes matter."""
        return self.state()

    def close(self) -> None:  # noqa: B027 - most engines hold nothing to close
        """Release the engine's resources."""

    @abstractmethod
    def _moments(self) -> dict[str, Slice]:
        """Return the optimizer's moments, by name. Collective."""

    @abstractmethod
    def _load_moments(self, state: TrainState, fresh: Set[str]) -> None:
        """Load the moments, after the weights and the step counts; those of `fresh` parameters are zero."""

    def _with_moments(self, moments: Mapping[str, Slice]) -> TrainState:
        since = {f"{SINCE}{name}": steps for name, steps in self.moments_since.items()}
        values = {"optimizer_steps": self.optimizer_steps, **since}
        if self.average is not None:
            values[UPDATES] = self.average.num_updates
        averages = {name: self.slices.of(name, tensor) for name, tensor in self._averages().items()}
        return TrainState(slices={**self.state_without_moments().slices, **averages, **moments}, values=values)

    def state_without_moments(self) -> TrainState:
        """Return weights, buffers and counters only, by name: all that a run at step 0 needs. Collective."""
        return TrainState(slices={name: self.slices.of(name, tensor) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        """Return weights, buffers and counters, which every engine lays out alike."""
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"model.{name}": b for name, b in self.model.named_buffers()}
        tensors[COUNTS] = self.previous_counts
        return tensors

    def _averages(self) -> dict[str, Tensor]:
        """Return the moving averages, each laid out as its weight is."""
        return {} if self.average is None else {f"{AVERAGE}{n}": t for n, t in self.average.tensors.items()}
