"""Find layouts that fit, the fastest first: order by an estimate, measure by fake steps, rank by the time model."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from trainer.distributed.rank_layout import Degrees
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.parallel.pipeline_stages import PipelineStages, pipeline_stages
from trainer.plan.layout_estimates import estimated_seconds, kept_share, least_row_bytes, least_state_bytes
from trainer.plan.layouts import Choices, Cluster, PlannedLayout, layouts_of
from trainer.plan.links import Links
from trainer.plan.step_cost import StepCost
from trainer.plan.step_time import StepTime, step_time

_LONGER: Final = 3.0
"""How much longer is searched as long as nothing fits: that nothing does must not follow from a busy machine."""
_OF_WHOLE: Final = 0.6
"""Share of the time, or of what is measured if none fits, for layouts whose ranks have whole rows and all layers."""


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
    seconds: float = 24.0
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
) -> Plan:
    """Return the layouts that were measured.

    Layouts are tried by their estimated time: first those whose ranks have whole rows and all layers, then those with
    pipelines and shared rows; of these, until one fits, every second is what probably needs least memory. One that
    surely or probably needs more than a layout that did not fit is left out, and so is a slower one of a family that
    has a layout that fits.
    """
    start, effort, plan = time.monotonic(), effort or Effort(), Plan()
    memory = _Memory(config, cluster, num_ids)
    left = list(_candidates(config, cluster, choices, num_ids, plan))
    has_groups = any(layout.groups for layout in left)
    while left and len(plan.fitting) + len(plan.too_big) < effort.most and len(plan.fitting) < effort.wanted:
        passed = time.monotonic() - start
        if passed > effort.seconds * (1 if plan.fitting else _LONGER):
            break
        layout = left[0]
        if layout.groups and not plan.fitting and len(plan.too_big) % 2 == 1:
            layout = min(left, key=memory.least)
        left.remove(layout)
        is_enough = passed > effort.seconds * _OF_WHOLE or len(plan.fitting) >= effort.wanted - 2
        is_enough = is_enough if plan.fitting else len(plan.too_big) >= _OF_WHOLE * effort.most
        if _is_excluded(layout, plan) or memory.is_hopeless(layout):
            continue
        if has_groups and not layout.groups and is_enough:
            continue  # leave some time and places to layouts of other kinds
        applied = layout.applied(config)
        if applied is None:
            continue
        cost = measure(applied)
        memory.learn(layout, cost)
        took = _time(config, layout, cost, cluster, links)
        found = MeasuredLayout(layout=layout, cost=cost, time=took, fits=cost.peak <= cluster.usable)
        (plan.fitting if found.fits else plan.too_big).append(found)
    plan.fitting.sort(key=lambda one: one.time.total)
    plan.too_big.sort(key=lambda one: one.cost.peak)
    return plan


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
    config: ExperimentConfig, cluster: Cluster, choices: Choices, num_ids: int, plan: Plan
) -> Sequence[PlannedLayout]:
    """Return the layouts whose state has room, by their estimated time."""
    possible = list(layouts_of(config, cluster, choices))
    states = {layout: least_state_bytes(config, layout, cluster.world_size, num_ids) for layout in possible}
    plan.num_possible = len(possible)
    if possible:
        plan.smallest_state = min(possible, key=lambda layout: states[layout])
        plan.least_state = states[plan.smallest_state]
    roomy = [layout for layout in possible if states[layout] <= cluster.usable]
    plan.num_without_room = len(possible) - len(roomy)
    return sorted(roomy, key=lambda layout: (bool(layout.groups), estimated_seconds(config, layout, cluster, num_ids)))


class _Memory:
    """Memory of layouts that were measured, which predicts that of others."""

    def __init__(self, config: ExperimentConfig, cluster: Cluster, num_ids: int) -> None:
        self.config, self.cluster, self.num_ids = config, cluster, num_ids
        self._beyond: dict[tuple[str, bool], float] = {}
        """Least share of what rows need beyond the state in what they surely need, by kind of layout."""
        self._stages: dict[tuple[int, str], PipelineStages | None] = {}

    def learn(self, layout: PlannedLayout, cost: StepCost) -> None:
        """Take in a measurement."""
        here = max(0.0, cost.peak - max(self._state(layout), cost.resident)) / self._rows(layout)
        kind = self._kind(layout)
        self._beyond[kind] = min(here, self._beyond.get(kind, here))

    def is_hopeless(self, layout: PlannedLayout) -> bool:
        """Return whether a layout would need more than there is, as far as others tell."""
        return self.least(layout) > self.cluster.usable

    def least(self, layout: PlannedLayout) -> float:
        """Return the bytes that a layout probably needs at least."""
        return self._state(layout) + max(1.0, self._beyond.get(self._kind(layout), 1.0)) * self._rows(layout)

    def _kind(self, layout: PlannedLayout) -> tuple[str, bool]:
        """Return what is computed again, and whether rows arrive from other ranks."""
        return layout.recompute, layout.ep_size > 1

    def _state(self, layout: PlannedLayout) -> int:
        return least_state_bytes(self.config, layout, self.cluster.world_size, self.num_ids)

    def _rows(self, layout: PlannedLayout) -> float:
        """Return the bytes that the rows of a rank surely keep at once."""
        config, world = self.config, self.cluster.world_size
        size = -(-layout.rows(config, world) // layout.micro_batches(config, world))
        return least_row_bytes(config, layout) * size * self._kept_share(layout)

    def _kept_share(self, layout: PlannedLayout) -> float:
        key = layout.pp_size, layout.pp_schedule
        if layout.pp_size == 1:
            return 1.0
        if key not in self._stages:
            degrees = Degrees(pp_size=layout.pp_size, pp_schedule=layout.pp_schedule)
            try:
                self._stages[key] = pipeline_stages(self.config.model, self.num_ids, degrees)
            except ConfigError:  # too few layers
                self._stages[key] = None
        stages = self._stages[key]
        return math.inf if stages is None else kept_share(self.config, layout, self.cluster.world_size, stages)
