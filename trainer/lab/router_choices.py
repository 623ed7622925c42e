"""Compare what routers choose for the same logits: share of the best score kept, load balance and speed.

Every choice is measured by the same scores, the softmax of the logits, and on the same linear programme
(`evaluation/routing_optimum.py`): k experts for a token, and a capacity of the fair share times a capacity factor.

# T tokens, n valid tokens of one sequence, k experts per token, E experts, D d_model.
"""

import functools
import operator
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.evaluation.routing_optimum import Optimality, measure_optimality, within_capacity
from trainer.lab.logits import LayerLogits, Logits, LogitsKind
from trainer.lab.router_kinds import router_config
from trainer.moe.routers.bias_balanced import BiasBalancedRouter
from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routers.non_causal import sequence_capacity
from trainer.moe.routing import Router, RoutingContext
from trainer.ops.select import round_mantissa

FACTORS = (1.0, 1.25)
"""Capacity factors; balance, experts per token and time are measured with the first."""
UPDATES = 200
"""Steps that a router with a selection bias learns it for, before it is measured."""
BIAS_UPDATE_RATE = 0.01
"""Update rate at the first of those steps; it decays linearly to 0. The default is for many more steps than 200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One router on one kind of logits, all layers together."""

    router: str
    logits: LogitsKind
    top_k: int
    """k of the programme: the router's option; without one, how many experts its tokens asked for, rounded."""
    experts_per_token: float
    """Mean number that was asked for."""
    load_imbalance: float
    """Busiest expert over the mean, before drops, of the worst layer."""
    at: dict[float, Optimality]
    """Measurements by capacity factor."""
    call_s: float
    """Median seconds of one call for one layer, without gradients."""


def compare_choices(kinds: Sequence[str], logits: Sequence[Logits], *, top_k: int, rounds: int) -> list[Choice]:
    """Measure routers on logits, kind of logits by kind of logits, in the order given.

    Args:
        kinds: of routers.
        logits: of every kind.
        top_k: k, of routers that have the option.
        rounds: how often each router is timed. All of them are called once, then all a second time, and so on, so that
            what else the machine does meets all alike.

    Raises:
        ConfigError: if a router cannot be with so many experts.
    """
    choices = []
    for given in logits:
        trials = [_Trial(kind, given, top_k=top_k) for kind in kinds]
        yardsticks = [Yardstick(layer.measured, given.context) for layer in given.layers]
        seconds = _timed(trials, rounds)
        choices += [trial.measured(yardsticks, call_s) for trial, call_s in zip(trials, seconds, strict=True)]
    return choices


def _timed(trials: Sequence["_Trial"], rounds: int) -> list[float]:
    """Return each router's median seconds of a call; every round begins with another one, and the first is warm-up."""
    seconds: list[list[float]] = [[] for _ in trials]
    for turn in range(rounds + 1):
        for place in range(len(trials)):
            number = (turn + place) % len(trials)
            call_s = trials[number].timed()
            if turn > 0:
                seconds[number].append(call_s)
    return [statistics.median(of_trial) for of_trial in seconds]


class _Trial:
    """A router of one kind for every layer and capacity factor, ready to be measured and timed."""

    def __init__(self, kind: str, given: Logits, *, top_k: int) -> None:
        self._kind, self._given = kind, given
        self._config, *others = [
            router_config(kind, num_experts=given.num_experts, top_k=top_k, room=factor) for factor in FACTORS
        ]
        self._routers = [self._ready(self._config)]
        # Only what has room to set chooses differently at another factor.
        self._routers += [self._routers[0] if config == self._config else self._ready(config) for config in others]

    def _ready(self, config: RouterOptions) -> list[Router]:
        """Return a router for every layer."""
        return [ready_router(config, layer, self._given.rehearsal) for layer in self._given.layers]

    def timed(self) -> float:
        """Return the mean seconds of one call."""
        start = time.perf_counter()
        for router, layer in zip(self._routers[0], self._given.layers, strict=True):
            with torch.no_grad():
                router(layer.measured, self._given.context)
        return (time.perf_counter() - start) / len(self._given.layers)

    def measured(self, yardsticks: Sequence["Yardstick"], call_s: float) -> Choice:
        """Return what the routers choose, measured."""
        layers, context = self._given.layers, self._given.context
        chosen = [
            [chosen_experts(router, layer.measured, context) for router, layer in zip(routers, layers, strict=True)]
            for routers in self._routers
        ]
        counts = torch.stack([layer.sum(0) for layer in chosen[0]]).double()  # (L, E)
        asked = float(counts.sum()) / (len(counts) * int(context.valid.sum()))
        top_k = getattr(self._config, "top_k", None) or max(1, round(asked))
        at: dict[float, Optimality] = {}
        for factor, of_layers in zip(FACTORS, chosen, strict=True):
            pairs = zip(yardsticks, of_layers, strict=True)
            at[factor] = _sum([stick.measure(layer, top_k=top_k, factor=factor) for stick, layer in pairs])
        return Choice(
            router=self._kind,
            logits=self._given.kind,
            top_k=top_k,
            experts_per_token=asked,
            load_imbalance=float((counts.amax(-1) / counts.mean(-1)).max()),
            at=at,
            call_s=call_s,
        )


class Yardstick:
    """The best choices for the sequences of one layer, each solved once for each k and factor."""

    def __init__(self, logits: Tensor, context: RoutingContext) -> None:
        """Score by the softmax of the logits (T, E)."""
        self._valid = context.valid_rows
        scores = logits.softmax(-1).double().view(*self._valid.shape, -1)  # (B, S, E)
        self._rows = [round_mantissa(row[valid]) for row, valid in zip(scores, self._valid, strict=True)]
        self._best: dict[tuple[int, int, float], Optimality] = {}

    def measure(self, chosen: Tensor, *, top_k: int, factor: float) -> Optimality:
        """Measure a choice (T, E) bool; sums over sequences.

        Args:
            chosen: before any drops; tokens that are not valid do not count.
            top_k: k of the programme.
            factor: of the room, in units of an expert's fair share k * n / E.
        """
        rows = chosen.view(*self._valid.shape, -1)
        return _sum([self._of_row(row, rows[row, valid], top_k, factor) for row, valid in enumerate(self._valid)])

    def _of_row(self, row: int, chosen: Tensor, top_k: int, factor: float) -> Optimality:
        scores = self._rows[row]
        room = sequence_capacity(len(scores), scores.shape[1], top_k=top_k, factor=factor)
        if (row, top_k, factor) not in self._best:
            nothing = torch.zeros_like(chosen)
            self._best[row, top_k, factor], _ = measure_optimality(scores, nothing, top_k=top_k, capacity=room)
        kept = within_capacity(scores, chosen, top_k=top_k, capacity=room)
        return replace(self._best[row, top_k, factor], kept=int(kept.sum()), score=float(scores[kept].sum()))


def _sum(parts: Sequence[Optimality]) -> Optimality:
    return functools.reduce(operator.add, parts)


def ready_router(config: RouterOptions, layer: LayerLogits, rehearsal: RoutingContext) -> Router:
    """Return a router whose logits are what it reads, after it has learned its selection bias if it has one."""
    num_experts = layer.measured.shape[-1]
    router: Router = config.build(d_model=num_experts, num_experts=num_experts, layer=0)
    set_identity_gate(router)
    if isinstance(router, BiasBalancedRouter):
        for step in range(UPDATES):
            router.bias_update_rate = BIAS_UPDATE_RATE * (1 - step / UPDATES)
            x = layer.rehearsed[step % len(layer.rehearsed)]
            router.update(chosen_experts(router, x, rehearsal).sum(0))
    return router


def unreadable(kinds: Sequence[str], *, num_experts: int, top_k: int) -> dict[str, str]:
    """Return the routers of which nobody has said how they are given logits, with why."""
    found = {}
    for kind in kinds:
        config = router_config(kind, num_experts=num_experts, top_k=top_k)
        try:
            set_identity_gate(config.build(d_model=num_experts, num_experts=num_experts, layer=0))
        except ConfigError as error:
            found[kind] = str(error)
    return found


@torch.no_grad()
def set_identity_gate(router: nn.Module) -> None:
    """Set a router's weights so that its logits are what it reads, D = E.

    Of `cosine` they are that only but for a positive factor for each token, since it divides by their length: it
    chooses the same. The noise of `noisy_top_k` gets the size that it has in the middle of its range, softplus(0).

    Raises:
        ConfigError: if a weight is not known, and is not the only one, E x E: a new router's must be listed here.
    """
    weights = dict(router.named_parameters())
    for name, weight in weights.items():
        is_gate = len(weights) == 1 and weight.dim() == 2 and weight.shape[0] == weight.shape[1]
        match "gate.weight" if is_gate else name:
            case "gate.weight" | "projection.weight" | "directions":
                nn.init.eye_(weight)
            case "noise_gate.weight" | "log_scale":
                nn.init.zeros_(weight)
            case _:
                raise ConfigError(f"{type(router).__name__}.{name}: trainer/lab/router_choices.py has no value for it")


@torch.no_grad()
def chosen_experts(router: Router, x: Tensor, context: RoutingContext) -> Tensor:
    """Return (T, E) bool: which experts a router chooses for x (T, D), before drops."""
    decision = router(x, context).decision
    real = decision.kept & (decision.expert_index < decision.num_experts)
    chosen = torch.zeros(decision.num_tokens, decision.num_experts, dtype=torch.bool)
    chosen[decision.token_index[real], decision.expert_index[real]] = True
    return chosen
