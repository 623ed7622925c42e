"""Show a plan: a table of layouts, the reasons of their order, and what did not fit."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from trainer.console import formatting
from trainer.experiment import ExperimentConfig
from trainer.plan.dry_run import window_name
from trainer.plan.find_layouts import MeasuredLayout, Plan
from trainer.plan.layouts import Cluster, PlannedLayout

_HEAD = (
    f"{'':>3} {'ep':>3} {'':<12} {'weights and moments':<22} {'recompute':<21} {'rows':>4} {'peak':>8} "
    f"{'sent':>8} {'step':>7} {'tokens/s':>9} {'of peak':>7}  where the time goes"
)


def plan_lines(config: ExperimentConfig, cluster: Cluster, plan: Plan, *, assumed: str) -> Iterator[str]:
    """Yield the lines of a plan."""
    gpu = cluster.gpu
    yield (
        f"{config.name} on {cluster.world_size} {gpu.name}, {cluster.per_node} in a machine: {len(plan.fitting)} of "
        f"{plan.num_possible} layouts, the fastest first"
    )
    yield f"  memory: {formatting.size(cluster.usable)} a rank for tensors; {assumed}"
    yield f"  speeds: {gpu.source}. Times are of a model, not measured."
    yield _HEAD
    for place, one in enumerate(plan.fitting, start=1):
        yield _row(config, cluster, one, f"{place}.")
    for one in plan.too_big:
        yield _row(config, cluster, one, "no")
    if plan.too_big:
        smallest = plan.too_big[0].cost
        of = f", on {smallest.rank}" if smallest.rank else ""
        yield f"no: does not fit; most memory is needed in {window_name(smallest.worst)}{of}"
    if plan.num_without_room:
        yield f"{plan.num_without_room} others have no room for weights, gradients and moments alone"
    if plan.num_without_room_for_rows:
        yield f"{plan.num_without_room_for_rows} others surely have none with what rows keep and what is gathered"
    yield from _reasons(plan)


def _row(config: ExperimentConfig, cluster: Cluster, one: MeasuredLayout, place: str) -> str:
    layout, cost, time = one.layout, one.cost, one.time
    tokens = config.train.global_batch_size * config.model.seq_len / time.total
    speed = cluster.gpu.flops[config.train.dtype]
    hops = ", 2 hops" if layout.hierarchical else ""
    return (
        f"{place:>3} {layout.ep_size:>3} {layout.groups:<12} {layout.sharding + hops:<22} {layout.recompute:<21} "
        f"{layout.micro_batch_size:>4} {formatting.size(cost.peak):>8} {formatting.size(cost.total('bytes')):>8} "
        f"{_seconds(time.total):>7} {formatting.rate(tokens):>9} "
        f"{formatting.percent(cost.total('flops') / time.total / speed):>7}  {_parts(one)}"
    )


def _parts(one: MeasuredLayout) -> str:
    time = one.time
    parts = {
        "computing": time.computation,
        "rows to experts": time.exchanged,
        "weights and gradients": time.weights - time.hidden,
        "stages": time.stages,
    }
    return ", ".join(f"{name} {share:.0%}" for name, part in parts.items() if (share := part / time.total) >= 0.005)


def _reasons(plan: Plan) -> Iterator[str]:
    """Yield why the first layout is before the second."""
    if len(plan.fitting) < 2:
        return
    first, second = plan.fitting[:2]
    less = {
        "computes": second.time.computation - first.time.computation,
        "waits for rows": second.time.exchanged - first.time.exchanged,
        "waits for weights and gradients": (second.time.weights - second.time.hidden)
        - (first.time.weights - first.time.hidden),
        "waits for stages": second.time.stages - first.time.stages,
    }
    what = max(less, key=lambda name: less[name])
    gained = second.time.total - first.time.total
    yield f"1. is {_seconds(gained)} faster than 2., since it {what} {_seconds(less[what])} less"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def no_layout(config: ExperimentConfig, cluster: Cluster, plan: Plan) -> str:
    """Return the message that nothing fits: by how much, and the nearest option."""
    room = formatting.size(cluster.usable)
    where = (
        f"{config.name}: does not fit on {cluster.world_size} {cluster.gpu.name}, which have {room} each for tensors"
    )
    if not plan.too_big:
        layout, least = plan.smallest_state, plan.least_state
        assert layout is not None, "some are possible"
        return (
            f"{where}: weights, gradients and moments alone need {formatting.size(least)} at ep_size {layout.ep_size}, "
            f"{_named(layout)}, which is {formatting.size(least - cluster.usable)} too much; use at least "
            f"{-(-least // cluster.usable)} times as many ranks, or GPUs with more memory"
        )
    nearest = plan.too_big[0]
    layout = nearest.layout
    return (
        f"{where}: the smallest layout that was tried needs {formatting.size(nearest.cost.peak)}, "
        f"{formatting.size(nearest.cost.peak - cluster.usable)} too much (ep_size {layout.ep_size}, {_named(layout)}, "
        f"recompute {layout.recompute}, micro_batch_size {layout.micro_batch_size}; most in "
        f"{window_name(nearest.cost.worst)}); use more ranks, GPUs with more memory, or a shorter model.seq_len"
    )


def _named(layout: PlannedLayout) -> str:
    """Return how weights and moments are shared, and the groups beside."""
    stages = [f"pp_size {layout.pp_size} by {layout.pp_schedule}"] if layout.pp_size > 1 else []
    rows = [f"cp_size {layout.cp_size} by {layout.cp}"] if layout.cp_size > 1 else []
    return ", ".join([*stages, *rows, layout.sharding])


def plan_record(config: ExperimentConfig, cluster: Cluster, plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values."""

    def record(one: MeasuredLayout) -> dict[str, Any]:
        calls = {key.of: 0.0 for key in one.cost.totals if key.unit == "calls"}
        return {
            "layout": asdict(one.layout),
            "fits": one.fits,
            "peak_bytes": one.cost.peak,
            "resident_bytes": one.cost.resident,
            "weight_bytes": one.cost.weights,
            "sent_bytes": one.cost.total("bytes"),
            "messages": one.cost.total("messages"),
            "collectives": {name: one.cost.total("calls", name) for name in calls},
            "flops": one.cost.total("flops"),
            "seconds_model": {**asdict(one.time), "total": one.time.total},
        }

    return {
        "config": config.name,
        "world_size": cluster.world_size,
        "per_node": cluster.per_node,
        "gpu": cluster.gpu.name,
        "usable_bytes": cluster.usable,
        "layouts": [record(one) for one in [*plan.fitting, *plan.too_big]],
        "without_room": plan.num_without_room,
    }
