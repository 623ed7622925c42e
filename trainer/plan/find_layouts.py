"""Find layouts that fit, the fastest first: order by an estimate, measure by fake steps, rank by the time model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer.experiment import ExperimentConfig
from trainer.plan.layouts import (
    Choices,
    Cluster,
    PlannedLayout,
    estimated_seconds,
    layouts_of,
    least_row_bytes,
    least_state_bytes,
)
from trainer.plan.links import Links
from trainer.plan.step_cost import StepCost
from trainer.plan.step_time import StepTime, step_time


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
    """Time after which no further layout is measured, once one fits."""


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

    Layouts are tried by their estimated time. One that surely or probably needs more than a layout that did not fit is
    left out, and so is a slower one of a family that has a layout that fits.
    """
    start, effort, plan = time.monotonic(), effort or Effort(), Plan()
    memory = _Memory(config, cluster, num_ids)
    for layout in _candidates(config, cluster, choices, num_ids, plan):
        if len(plan.fitting) + len(plan.too_big) >= effort.most or len(plan.fitting) >= effort.wanted:
            break
        if plan.fitting and time.monotonic() - start > effort.seconds:
            break
        if any(layout.family == one.layout.family for one in plan.fitting):
            continue
        if any(layout.contains(one.layout) for one in plan.too_big) or memory.is_hopeless(layout):
            continue
        applied = layout.applied(config)
        if applied is None:
            continue
        cost = measure(applied)
        memory.learn(layout, cost)
        took = step_time(cost, cluster.gpu, ranks_per_node=cluster.per_node, links=links)
        found = MeasuredLayout(layout=layout, cost=cost, time=took, fits=cost.peak <= cluster.usable)
        (plan.fitting if found.fits else plan.too_big).append(found)
    plan.fitting.sort(key=lambda one: one.time.total)
    plan.too_big.sort(key=lambda one: one.cost.peak)
    return plan


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
    return sorted(roomy, key=lambda layout: estimated_seconds(config, layout, cluster, num_ids))


class _Memory:
    """Memory of layouts that were measured, which predicts that of others."""

    def __init__(self, config: ExperimentConfig, cluster: Cluster, num_ids: int) -> None:
        self.config, self.cluster, self.num_ids = config, cluster, num_ids
        self._rows = -(-config.train.global_batch_size // cluster.world_size)
        self._of_row: dict[tuple[str, bool], float] = {}
        """Fewest bytes of a row of a micro-batch beyond the state that were measured, by kind of layout."""

    def learn(self, layout: PlannedLayout, cost: StepCost) -> None:
        """Take in a measurement."""
        here = max(0.0, cost.peak - max(self._state(layout), cost.resident)) / self._size(layout)
        kind = self._kind(layout)
        self._of_row[kind] = min(here, self._of_row.get(kind, here))

    def is_hopeless(self, layout: PlannedLayout) -> bool:
        """Return whether a layout would need more than there is, as far as others tell."""
        of_row = self._of_row.get(self._kind(layout)) or least_row_bytes(self.config, layout)
        return self._state(layout) + of_row * self._size(layout) > self.cluster.usable

    def _kind(self, layout: PlannedLayout) -> tuple[str, bool]:
        """Return what is computed again, and whether rows arrive from other ranks."""
        return layout.recompute, layout.ep_size > 1

    def _state(self, layout: PlannedLayout) -> int:
        return least_state_bytes(self.config, layout, self.cluster.world_size, self.num_ids)

    def _size(self, layout: PlannedLayout) -> int:
        num_batches = -(-self._rows // layout.micro_batch_size)
        return -(-self._rows // num_batches)
