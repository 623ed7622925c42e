"""Find layouts that fit, the fastest first: order by an estimate, measure by fake steps, rank by the time model."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from trainer.experiment import ExperimentConfig
from trainer.plan.layout_estimates import EstimatedTime, estimated_time, least_state_bytes
from trainer.plan.layouts import Choices, Cluster, PlannedLayout, layouts_of
from trainer.plan.least_memory import LeastMemory
from trainer.plan.links import Links
from trainer.plan.step_cost import StepCost
from trainer.plan.step_time import StepTime, step_time

_LONGER: Final = 3.0
"""How much longer is searched as long as nothing fits: that nothing does must not follow from a busy machine."""
Kind = tuple[bool, bool]
"""Whether a layout has stages, and whether ranks share rows."""
_ERROR: Final = 1.1
_SMALLER: Final = 0.9
"""Room to look for, by that before, after a layout that did not fit, as long as none does."""
_SLOWNESS: Final = 4.0
"""Time of computation by that of its products, before a layout was measured: published runs reach a quarter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayout:
    """A layout with what its fake step costs."""

    layout: PlannedLayout
    cost: StepCost
    time: StepTime
    fits: bool


@dataclass(slots=True, kw_only=True)
class Plan:
    """Layouts that were found."""

    fitting: list[MeasuredLayout] = field(default_factory=list)
    """Fastest first."""
    too_big: list[MeasuredLayout] = field(default_factory=list)
    """Smallest first."""
    num_possible: int = 0
    num_without_room: int = 0
    """Layouts whose weights, gradients and moments alone are too big."""
    num_without_room_for_rows: int = 0
    """Others that surely need more together with what rows keep, what stages receive, or a layer that is gathered."""
    least_state: int = 0
    """Fewest bytes of weights, gradients and moments of all layouts."""
    smallest_state: PlannedLayout | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """When to stop."""

    wanted: int = 6
    """Fitting layouts of different families."""
    most: int = 14
    """Layouts to measure."""
    seconds: float = 17.0
    """Time after which no further layout is measured; three times as long without one that fits."""


def find_layouts(
    config: ExperimentConfig,
    cluster: Cluster,
    choices: Choices,
    measure: Callable[[ExperimentConfig], StepCost],
    *,
    num_ids: int,
    links: Links | None = None,
    effort: Effort | None = None,
    imbalance: float = 1.0,
) -> Plan:
    """Return the layouts that were measured.

    Of those that are expected to fit the one of the least estimated time is next; until one does, each that does not
    lets smaller ones be tried. Estimates take the slowness of computation from what was measured. What surely or
    probably needs more than there is is left out, and so is a slower one of a family that has a layout that fits.
    """
    start, effort, plan = time.monotonic(), effort or Effort(), Plan()
    memory, slowness = LeastMemory(config, cluster, num_ids), _SLOWNESS
    kinds: Counter[Kind] = Counter()
    times = {
        layout: estimated_time(
            config, layout, cluster, num_ids, imbalance=imbalance, largest_share=memory.largest_share(layout)
        )
        for layout in _candidates(config, cluster, choices, num_ids, memory, plan)
    }
    while times and len(plan.fitting) + len(plan.too_big) < effort.most and len(plan.fitting) < effort.wanted:
        if time.monotonic() - start > effort.seconds * (1 if plan.fitting else _LONGER):
            break
        room = cluster.usable * (1 if plan.fitting else _SMALLER ** len(plan.too_big))
        layout = _next(times, memory, room, slowness, kinds)
        estimate = times.pop(layout)
        is_last = not times and not plan.fitting and not plan.too_big  # what is said to be too big was measured
        if _is_excluded(layout, plan) or (memory.is_hopeless(layout) and not is_last):
            continue
        applied = layout.applied(config)
        if applied is None:
            continue
        cost = measure(applied)
        memory.learn(layout, cost)
        kinds[_kind(layout)] += 1
        took = _time(config, layout, cost, cluster, links)
        measured = estimate.slowness(took.computation)
        slowness = min(slowness, measured) if plan.fitting or plan.too_big else measured
        found = MeasuredLayout(layout=layout, cost=cost, time=took, fits=cost.peak <= cluster.usable)
        (plan.fitting if found.fits else plan.too_big).append(found)
    plan.fitting.sort(key=lambda one: one.time.total)
    plan.too_big.sort(key=lambda one: one.cost.peak)
    return plan


def _next(
    times: dict[PlannedLayout, EstimatedTime], memory: LeastMemory, room: float, slowness: float, kinds: Counter[Kind]
) -> PlannedLayout:
    """Return the fastest layout that is expected to fit; if none is, the smallest.

    Estimates err by about a tenth, alike for layouts of a kind: each one that was measured lets other kinds go first.
    """

    def seconds(layout: PlannedLayout) -> float:
        return times[layout].total(slowness) * _ERROR ** kinds[_kind(layout)]

    for layout in sorted(times, key=seconds):
        if memory.expected(layout) <= room:
            return layout
    return min(times, key=memory.expected)


def _kind(layout: PlannedLayout) -> Kind:
    return layout.pp_size > 1, layout.cp_size > 1


def _is_excluded(layout: PlannedLayout, plan: Plan) -> bool:
    """Return whether a layout surely does not fit, or has a faster one of its family that does."""
    if any(layout.family == one.layout.family for one in plan.fitting):
        return True
    return any(layout.contains(one.layout) for one in plan.too_big)


def _time(
    config: ExperimentConfig, layout: PlannedLayout, cost: StepCost, cluster: Cluster, links: Links | None
) -> StepTime:
    idle = layout.idle(layout.passes(config, cluster.world_size))
    return step_time(cost, cluster.gpu, ranks_per_node=cluster.per_node, links=links, idle=idle)


def _candidates(
    config: ExperimentConfig, cluster: Cluster, choices: Choices, num_ids: int, memory: LeastMemory, plan: Plan
) -> list[PlannedLayout]:
    """Return the layouts that may have room; the smallest one if none surely has."""
    possible = list(layouts_of(config, cluster, choices))
    states = {layout: least_state_bytes(config, layout, cluster.world_size, num_ids) for layout in possible}
    plan.num_possible = len(possible)
    if possible:
        plan.smallest_state = min(possible, key=lambda layout: states[layout])
        plan.least_state = states[plan.smallest_state]
    sizes = {layout: memory.surely(layout) for layout in possible if states[layout] <= cluster.usable}
    plan.num_without_room = len(possible) - len(sizes)
    roomy = [layout for layout, size in sizes.items() if size <= cluster.usable]
    plan.num_without_room_for_rows = len(sizes) - len(roomy)
    return roomy or sorted(sizes, key=lambda layout: sizes[layout])[:1]
