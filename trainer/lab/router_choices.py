"""Compare routers on the same logits: share of the best score kept, load balance and speed.

All choices are scored by the softmax of the logits and compared with the same linear programme
(`evaluation/routing_optimum.py`): k experts per token, and a capacity of the fair share times a capacity factor.

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
from trainer.lab.router_configs import router_config
from trainer.moe.build_router import build_router
from trainer.moe.routers.bias_balanced import BiasBalancedRouter
from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routers.non_causal import sequence_capacity
from trainer.moe.routing import Router, RoutingContext
from trainer.ops.select import round_mantissa

FACTORS = (1.0, 1.25)
"""Capacity factors; load balance, experts per token and time are measured at the first."""
UPDATES = 200
"""Bias updates of a router with a selection bias before it is measured."""
BIAS_UPDATE_RATE = 0.01
"""Initial rate of these updates; decays linearly to 0. The default rate is meant for many more steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Measurement of one router on one kind of logits, over all layers."""

    router: str
    logits: LogitsKind
    top_k: int
    """k of the programme: the router's option, else the rounded number of experts its tokens asked for."""
    experts_per_token: float
    """Mean number of experts a token asked for, before drops, like the load imbalance."""
    load_imbalance: float
    """Load of the busiest expert over the mean in the worst layer."""
    at: dict[float, Optimality]  # by capacity factor
    call_s: float
    """Median time of one call for one layer without gradients."""


def compare_choices(kinds: Sequence[str], logits: Sequence[Logits], *, top_k: int, rounds: int) -> list[Choice]:
    """Measure each router on each kind of logits, with k `top_k` if it has the option.

    Each is timed `rounds` times. A round calls every router once, so that other load on the machine affects all alike.

    Raises:
        ConfigError: if a router does not support this number of experts.
    """
    choices = []
    for given in logits:
        benchmarks = [_RouterBenchmark(kind, given, top_k=top_k) for kind in kinds]
        optima = [RoutingOptimum(layer.measured, given.context) for layer in given.layers]
        for turn in range(rounds + 1):  # the first is warm-up; each starts at another router
            first = turn % len(benchmarks)
            for benchmark in benchmarks[first:] + benchmarks[:first]:
                benchmark.time_call(is_counted=turn > 0)
        choices += [benchmark.choice(optima) for benchmark in benchmarks]
    return choices


class _RouterBenchmark:
    """Routers of one kind for every layer and capacity factor."""

    def __init__(self, kind: str, given: Logits, *, top_k: int) -> None:
        self._kind, self._given, self._seconds = kind, given, list[float]()
        self._config, *others = [
            router_config(kind, num_experts=given.num_experts, top_k=top_k, capacity_factor=factor)
            for factor in FACTORS
        ]
        self._routers = [self._prepare(self._config)]
        # Only a router with a capacity option chooses differently at another factor.
        self._routers += [self._routers[0] if config == self._config else self._prepare(config) for config in others]

    def _prepare(self, config: RouterOptions) -> list[Router]:
        return [prepare_router(config, layer, self._given.warmup_context) for layer in self._given.layers]

    def time_call(self, *, is_counted: bool) -> None:
        """Measure the seconds of one call, averaged over layers."""
        start = time.perf_counter()
        for router, layer in zip(self._routers[0], self._given.layers, strict=True):
            with torch.no_grad():
                router(layer.measured, self._given.context)
        if is_counted:
            self._seconds.append((time.perf_counter() - start) / len(self._given.layers))

    def choice(self, optima: Sequence["RoutingOptimum"]) -> Choice:
        """Measure the choices of the routers against the optimum of each layer."""
        layers, context = self._given.layers, self._given.context
        chosen = [
            [chosen_experts(router, layer.measured, context) for router, layer in zip(routers, layers, strict=True)]
            for routers in self._routers
        ]
        counts = torch.stack([layer.sum(0) for layer in chosen[0]]).double()  # (L, E)
        requested = float(counts.sum()) / (len(counts) * int(context.valid.sum()))
        top_k = getattr(self._config, "top_k", None) or max(1, round(requested))
        at: dict[float, Optimality] = {}
        for factor, of_layers in zip(FACTORS, chosen, strict=True):
            pairs = zip(optima, of_layers, strict=True)
            at[factor] = _sum([optimum.measure(layer, top_k=top_k, factor=factor) for optimum, layer in pairs])
        return Choice(
            router=self._kind,
            logits=self._given.kind,
            top_k=top_k,
            experts_per_token=requested,
            load_imbalance=float((counts.amax(-1) / counts.mean(-1)).max()),
            at=at,
            call_s=statistics.median(self._seconds),
        )


class RoutingOptimum:
    """Optimal choices for the sequences of one layer, solved once for each k and capacity factor."""

    def __init__(self, logits: Tensor, context: RoutingContext) -> None:
        """Score experts by the softmax of the logits (T, E)."""
        self._valid = context.valid_rows
        scores = logits.softmax(-1).double().view(*self._valid.shape, -1)  # (B, S, E)
        self._rows = [round_mantissa(row[valid]) for row, valid in zip(scores, self._valid, strict=True)]
        self._best: dict[tuple[int, int, float], Optimality] = {}

    def measure(self, chosen: Tensor, *, top_k: int, factor: float) -> Optimality:
        """Measure a choice, (T, E) bool before drops, against the programme with k `top_k`; sums over sequences.

        Invalid tokens do not count. `factor` is the capacity in units of an expert's fair share k * n / E.
        """
        rows = chosen.view(*self._valid.shape, -1)
        return _sum([self._of_row(row, rows[row, valid], top_k, factor) for row, valid in enumerate(self._valid)])

    def _of_row(self, row: int, chosen: Tensor, top_k: int, factor: float) -> Optimality:
        scores = self._rows[row]
        capacity = sequence_capacity(len(scores), scores.shape[1], top_k=top_k, factor=factor)
        if (row, top_k, factor) not in self._best:
            nothing = torch.zeros_like(chosen)
            self._best[row, top_k, factor], _ = measure_optimality(scores, nothing, top_k=top_k, capacity=capacity)
        kept = within_capacity(scores, chosen, top_k=top_k, capacity=capacity)
        return replace(self._best[row, top_k, factor], kept=int(kept.sum()), score=float(scores[kept].sum()))


def _sum(parts: Sequence[Optimality]) -> Optimality:
    return functools.reduce(operator.add, parts)


def prepare_router(config: RouterOptions, layer: LayerLogits, warmup_context: RoutingContext) -> Router:
    """Return a router whose logits are its input, with its selection bias, if any, learned on the warm-up logits."""
    num_experts = layer.measured.shape[-1]
    router = build_router(config, d_model=num_experts, num_experts=num_experts, layer=0, key="")
    set_identity_gate(router)
    if isinstance(router, BiasBalancedRouter):
        for step in range(UPDATES):
            router.bias_update_rate = BIAS_UPDATE_RATE * (1 - step / UPDATES)
            x = layer.warmup[step % len(layer.warmup)]
            router.update(chosen_experts(router, x, warmup_context).sum(0))
    return router


def kinds_without_logits(kinds: Sequence[str], *, num_experts: int, top_k: int) -> dict[str, str]:
    """Return the routers that cannot be given logits, each with the reason."""
    reasons = {}
    for kind in kinds:
        config = router_config(kind, num_experts=num_experts, top_k=top_k)
        try:
            set_identity_gate(config.build(d_model=num_experts, num_experts=num_experts, layer=0))
        except ConfigError as error:
            reasons[kind] = str(error)
    return reasons


@torch.no_grad()
def set_identity_gate(router: nn.Module) -> None:
    """Set a router's weights so that its logits are its input (D = E).

    The logits of `cosine` are scaled by a positive factor per token, since it normalises them; its choices are the
    same. The noise of `noisy_top_k` gets scale softplus(0), the middle of its range.

    Raises:
        ConfigError: if the router has a weight that is not listed here, other than a single E x E gate.
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
    """Return the experts a router chooses for x (T, D), before drops, as a (T, E) bool mask."""
    decision = router(x, context).decision
    real = decision.kept & (decision.expert_index < decision.num_experts)
    chosen = torch.zeros(decision.num_tokens, decision.num_experts, dtype=torch.bool)
    chosen[decision.token_index[real], decision.expert_index[real]] = True
    return chosen
