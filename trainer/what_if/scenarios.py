"""Predict every combination of settings from a trace."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from trainer.config.nodes import shown, shown_path
from trainer.errors import ConfigError, ResourceError
from trainer.moe.layer_options import CapacityConfig
from trainer.parallel.expert_placement import (
    PLACED_BY_NUMBERS,
    busiest_over_mean,
    contiguous_placement,
    named_placement,
    placement_by_loads,
    read_placement,
    write_placement,
)
from trainer.parallel.placement_programme import greedy_placement, solve_placement
from trainer.what_if.dispatch_traffic import SendingDispatcher
from trainer.what_if.evaluated_run import EvaluatedRun, RunOfTrace
from trainer.what_if.predicted_decision import check_top_ks, decide_from_trace
from trainer.what_if.prediction import (
    Hardware,
    LayoutOptions,
    PlacedExperts,
    Prediction,
    expert_loads,
    predict,
)
from trainer.what_if.traced_passes import Trace

CapacityPolicy = Literal["position", "choice_major", "probability", "random"]
_BY_LOADS = {"balanced": solve_placement, "greedy": greedy_placement}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenarios:
    """Settings of which every combination is predicted; None: those of the traced model."""

    capacities: Sequence[float | None] | None = None
    top_ks: Sequence[int] | None = None
    ep_sizes: Sequence[int] = ()
    placements: Sequence[str] = ("contiguous",)
    """`contiguous`, `round_robin`, `greedy`, `balanced` or a JSON file."""
    replicas: int = 0
    """Copies of other ranks' experts on each rank; a file has its own."""
    policy: CapacityPolicy | None = None
    """Whom a capacity prefers."""
    dispatchers: Sequence[SendingDispatcher] = ("all_to_all",)
    speeds: tuple[float, float] | None = None
    """FLOP/s, and bytes per second, of a rank."""


def predict_all(folder: Path, wanted: Scenarios, run: RunOfTrace | None = None) -> list[Prediction]:
    """Return a prediction for each capacity and k, with the layouts of each.

    Given the traced run, it is evaluated at each of them; by the trace alone, later layers are estimates.

    Raises:
        ConfigError: if the trace cannot tell.
        CheckpointError: if the run has no such weights.
        DataError: if it is damaged, or of other text or weights than the run's.
    """
    trace = Trace(folder)
    top_ks = [trace.model.top_k] if wanted.top_ks is None else list(wanted.top_ks)
    check_top_ks(trace, top_ks)
    capacities = [trace.facts.capacity.factor] if wanted.capacities is None else wanted.capacities
    if "padded_all_to_all" in wanted.dispatchers and None in capacities:
        raise ConfigError("--dispatcher: padded_all_to_all needs a capacity; give --capacity without none")
    given = trace.facts.capacity
    if wanted.policy is not None:
        given = given.model_copy(update={"policy": wanted.policy})
    hardware = None if wanted.speeds is None else Hardware(flops=wanted.speeds[0], bandwidth=wanted.speeds[1])
    layouts = LayoutOptions(places=_places(trace, wanted), dispatchers=wanted.dispatchers, hardware=hardware)
    evaluated = None if run is None else run.load(trace)
    return [
        _predicted(trace, given.model_copy(update={"factor": factor}), top_k, layouts, evaluated)
        for factor in capacities
        for top_k in top_ks
    ]


def _predicted(
    trace: Trace, capacity: CapacityConfig, top_k: int, layouts: LayoutOptions, run: EvaluatedRun | None
) -> Prediction:
    """Predict by the trace; or by an evaluation of its run, beside the drops that the trace alone would say."""
    estimated, factor = decide_from_trace(trace, top_k=top_k, capacity=capacity), capacity.factor
    if run is None:
        return predict(trace, estimated, capacity=factor, top_k=top_k, is_evaluated=False, layouts=layouts)
    passes = run.passes(top_k=top_k, capacity=capacity)
    exact = predict(trace, passes, capacity=factor, top_k=top_k, is_evaluated=True, layouts=layouts)
    alone = predict(trace, estimated, capacity=factor, top_k=top_k, is_evaluated=False, layouts=LayoutOptions())
    return replace(exact, estimate=alone.dropped)


def _places(trace: Trace, wanted: Scenarios) -> list[PlacedExperts]:
    layers, experts = len(trace.model.moe_layers), trace.model.num_experts
    has_loads = not set(_BY_LOADS).isdisjoint(wanted.placements)
    loads = expert_loads(trace).tolist() if wanted.ep_sizes and has_loads else []
    found = []
    for size in wanted.ep_sizes:
        _check_size(size, experts, wanted.replicas)
        for name in wanted.placements:
            if name in _BY_LOADS:
                placement, _ = placement_by_loads(loads, size, _BY_LOADS[name], num_copies=wanted.replicas)
            elif name in PLACED_BY_NUMBERS:
                placement = named_placement(name, layers, experts, size, num_copies=wanted.replicas)
            else:
                placement = read_placement(Path(name), num_layers=layers, num_experts=experts, key="--placement")
                if placement.num_ranks != size:
                    raise ConfigError(
                        f"--placement: {shown(name)} is for {placement.num_ranks} ranks (ep_size), and --ep-size is "
                        f"{size}"
                    )
            found.append(PlacedExperts(name=name, placement=placement))
    return found


def _check_size(size: int, num_experts: int, num_copies: int) -> None:
    if size > num_experts:
        raise ConfigError(f"--ep-size: {size} is more than the {num_experts} experts; use 1 to {num_experts}")
    if num_copies > (most := num_experts - -(-num_experts // size)):
        raise ConfigError(
            f"--replicas: {num_copies}, and all other ranks of {size} together may have only {most} experts; use at "
            f"most {most}"
        )


def write_best_placement(folder: Path, num_ranks: int, to: Path, *, num_copies: int = 0) -> str:
    """Write the best placement by a trace's loads to a file for `parallel.placement`; return a line about it.

    Raises:
        ConfigError: if there are more ranks than experts.
        DataError: if the trace is damaged.
        ResourceError: if the disk refuses.
    """
    loads = expert_loads(Trace(folder)).tolist()
    _check_size(num_ranks, len(loads[0]), num_copies)
    placement, layers = placement_by_loads(loads, num_ranks, solve_placement, num_copies=num_copies)
    try:
        write_placement(to, placement)
    except OSError as error:
        raise ResourceError(f"{shown_path(to)}: cannot be written: {error.strerror}; name another file") from None
    before = busiest_over_mean(loads, contiguous_placement(len(loads), len(loads[0]), num_ranks))
    worst = max(layer.busiest / max(1, layer.bound) for layer in layers)
    return (
        f"{shown_path(to)}: busiest rank {fmean(busiest_over_mean(loads, placement)):.3f} times the mean, mean of "
        f"{len(layers)} MoE layers (contiguous: {fmean(before):.3f}); at most {worst - 1:.2%} above the best possible"
    )
