"""Predict every combination of settings from a trace."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import ConfigError
from trainer.what_if.dispatch_traffic import SendingDispatcher
from trainer.what_if.expert_placement import balanced_placement, contiguous_placement, read_placement
from trainer.what_if.predicted_decision import check_top_ks
from trainer.what_if.prediction import Hardware, PlacedExperts, Prediction, expert_loads, predict
from trainer.what_if.traced_passes import Trace

CapacityPolicy = Literal["position", "choice_major", "probability", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenarios:
    """Settings of which every combination is predicted; None: those of the traced model."""

    capacities: Sequence[float | None] | None = None
    top_ks: Sequence[int] | None = None
    ep_sizes: Sequence[int] = ()
    placements: Sequence[str] = ("contiguous",)
    """`contiguous`, `balanced` or a JSON file."""
    policy: CapacityPolicy | None = None
    """Whom a capacity prefers."""
    dispatchers: Sequence[SendingDispatcher] = ("all_to_all",)
    speeds: tuple[float, float] | None = None
    """FLOP/s, and bytes per second, of a rank."""


def predict_all(folder: Path, wanted: Scenarios) -> list[Prediction]:
    """Return a prediction for each capacity and k, with the layouts of each.

    Raises:
        ConfigError: if the trace cannot tell.
        DataError: if it is damaged.
    """
    trace = Trace(folder)
    top_ks = [trace.model.top_k] if wanted.top_ks is None else list(wanted.top_ks)
    check_top_ks(trace, top_ks)
    capacities = [trace.facts.capacity.factor] if wanted.capacities is None else wanted.capacities
    if "padded_all_to_all" in wanted.dispatchers and None in capacities:
        raise ConfigError("--dispatcher: padded_all_to_all needs a capacity; give --capacity without none")
    places, given = _places(trace, wanted), trace.facts.capacity
    if wanted.policy is not None:
        given = given.model_copy(update={"policy": wanted.policy})
    hardware = None if wanted.speeds is None else Hardware(flops=wanted.speeds[0], bandwidth=wanted.speeds[1])
    return [
        predict(
            trace,
            capacity=given.model_copy(update={"factor": factor}),
            top_k=top_k,
            places=places,
            dispatchers=wanted.dispatchers,
            hardware=hardware,
        )
        for factor in capacities
        for top_k in top_ks
    ]


def _places(trace: Trace, wanted: Scenarios) -> list[PlacedExperts]:
    layers, experts = len(trace.model.moe_layers), trace.model.num_experts
    loads = expert_loads(trace) if wanted.ep_sizes and "balanced" in wanted.placements else None
    found = []
    for size in wanted.ep_sizes:
        if size > experts:
            raise ConfigError(f"--ep-size: {size} is more than the {experts} experts; use 1 to {experts}")
        for name in wanted.placements:
            if name == "contiguous":
                owner = contiguous_placement(layers, experts, size)
            elif name == "balanced":
                assert loads is not None, "counted above"
                owner = balanced_placement(loads, size)
            else:
                owner = read_placement(Path(name), layers, experts)
                if int(owner.max()) >= size:
                    raise ConfigError(f"--placement: {name} has rank {int(owner.max())}, and --ep-size is {size}")
            found.append(PlacedExperts(name=name, num_ranks=size, owner=owner))
    return found
