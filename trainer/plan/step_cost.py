"""Costs of a step, as sums that are linear in layers and micro-batches, and its extrapolation to more of both.

# L layers, n micro-batches.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from trainer.lab.costs.step_operations import StepOperations
from trainer.plan.layer_pattern import LayerPattern
from trainer.plan.step_probe import ProbedStep
from trainer.plan.tensor_bytes import Window

Unit = Literal["calls", "bytes", "messages", "operations", "flops", "moved", "shard_calls"]


class Quantity(NamedTuple):
    """A quantity that is counted: of a collective and its ranks, or of products or others in a dtype, or FSDP2's."""

    unit: Unit
    of: str
    ranks: tuple[int, ...] | None = None
    """Ranks of a collective; None: computation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Cost of one step on one rank."""

    weights: int
    resident: int
    peaks: Mapping[Window, int]
    totals: Mapping[Quantity, float]
    rank: str = ""
    """Which rank of a pipeline has the memory, in words."""

    @property
    def peak(self) -> int:
        """Most bytes of tensors at once."""
        return max(self.peaks.values())

    @property
    def worst(self) -> Window:
        """The window of the peak."""
        return max(self.peaks, key=lambda window: self.peaks[window])

    def total(self, unit: Unit, of: str | None = None) -> float:
        """Return the sum of a unit, over everything or over what has a name."""
        return sum(value for key, value in self.totals.items() if key.unit == unit and of in (None, key.of))


def cost_of(step: ProbedStep) -> StepCost:
    """Return the cost of a step as it is."""
    return StepCost(weights=step.weights, resident=step.resident, peaks=step.peaks, totals=totals_of(step.operations))


def totals_of(operations: StepOperations) -> Counter[Quantity]:
    """Return the totals of what was computed and sent."""
    totals: Counter[Quantity] = Counter()
    for call, number in operations.collectives.items():
        totals[Quantity("calls", call.name, call.ranks)] += number
        totals[Quantity("bytes", call.name, call.ranks)] += number * call.bytes_sent
        totals[Quantity("messages", call.name, call.ranks)] += number * call.messages
    for kind, work in operations.work.items():
        name = f"{'products' if kind.is_product else 'others'} {str(kind.dtype).removeprefix('torch.')}"
        totals[Quantity("operations", name)] += work.number
        totals[Quantity("flops", name)] += work.flops
        totals[Quantity("moved", name)] += work.bytes_moved
    if operations.shard_calls:
        totals[Quantity("shard_calls", "fsdp")] = operations.shard_calls
    return totals


def with_layers(fewer: StepCost, more: StepCost, pattern: LayerPattern, wanted: int) -> StepCost:
    """Extrapolate from models of the pattern's two sizes to one of `wanted` layers.

    Everything is linear in L, but the peak: it is the largest of windows that are. Windows of blocks are linear in the
    number of the block too, so the peak is in those of the first or last period, or of no block.
    """
    (few, many), head = pattern.sizes, pattern.head + pattern.period
    step = (wanted - few) / (many - few)

    def line(low: float, high: float) -> float:
        return low + (high - low) * step

    peaks: dict[Window, int] = {}
    for (phase, block), low in fewer.peaks.items():
        here = there = block
        if block is not None and block >= head:
            here, there = block + many - few, block + wanted - few
        if (phase, here) in more.peaks:
            peaks[phase, there] = round(line(low, more.peaks[phase, here]))
    return StepCost(
        weights=round(line(fewer.weights, more.weights)),
        resident=round(line(fewer.resident, more.resident)),
        peaks=peaks,
        totals=extrapolated(fewer.totals, more.totals, step),
    )


def with_micro_batches(step: ProbedStep, taken: int, wanted: int, *, unit: int = 1) -> StepCost:
    """Extrapolate from a step of `taken` micro-batches and the one before it, of `unit` less; more have its peak.

    Their rows are there from the beginning.
    """
    cost, rows = cost_of(step), (wanted - taken) * step.batch
    return replace(
        cost,
        resident=cost.resident + rows,
        peaks={window: peak + rows for window, peak in cost.peaks.items()},
        totals=extrapolated(totals_of(step.first), cost.totals, (wanted - taken) / unit + 1),
    )


def extrapolated(low: Mapping[Quantity, float], high: Mapping[Quantity, float], step: float) -> dict[Quantity, float]:
    """Return what two measurements are on the way to, `step` times their distance from the first."""
    keys = [*low, *(key for key in high if key not in low)]
    return {key: low.get(key, 0) + (high.get(key, 0) - low.get(key, 0)) * step for key in keys}
