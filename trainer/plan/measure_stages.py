"""Measure a pipeline by fake steps of the ranks that may need most.

A shorter pipeline of stages of fewer layers is measured, and its costs are extrapolated: linear in the layers of a
stage, in micro-batches, and in the passes that are kept at once.

# P ranks of a pipeline, n passes of a schedule: of micro-batches, or of pairs of them that overlap; L layers.
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from trainer.experiment import ExperimentConfig
from trainer.parallel.pipeline_stages import SCHEDULES, PipelineStages, num_passes, pipeline_stages
from trainer.plan.fake_step import num_ids_of
from trainer.plan.kept_passes import PLANNED, kept_layers, kept_passes, received_buffers
from trainer.plan.layer_pattern import layer_pattern
from trainer.plan.measured_rank import Ranks, fake_rank
from trainer.plan.step_cost import Quantity, StepCost, cost_of, extrapolated, totals_of
from trainer.plan.step_probe import ProbedStep, shape_of_batches
from trainer.plan.tensor_bytes import Window

_FAR_MORE: Final = 1.1
"""Layers of a rank that is measured beside the one that keeps most, by the layers of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A rank of a pipeline, and of a shorter one that stands for it."""

    rank: int
    size: int
    """Ranks of the shorter pipeline."""
    index: int
    """Place in it."""
    sizes: tuple[int, ...]
    """Layers of its stages to measure; empty: those of the model."""
    first: int
    taken: int
    """Passes of the step before, and of the one that is measured: while most of them are kept, there are already
    gradients of all layers."""


def measure_stages(config: ExperimentConfig, ranks: Ranks, *, whole: bool, pool: Executor | None) -> StepCost:
    """Return the memory of the fullest rank of a pipeline, and the work of the busiest one."""
    stages = pipeline_stages(config.model, num_ids_of(config), config.parallel.degrees)
    number = num_passes(shape_of_batches(config, ranks.world_size)[0], config.parallel.at_once)
    if whole:
        steps = [fake_rank(config, ranks, pp_rank=rank) for rank in range(stages.num_ranks)]
        return _worst([_of_rank(cost_of(step), rank, stages) for rank, step in enumerate(steps)])
    places = _places(config, stages, number)
    work = [(place, size) for place in places for size in place.sizes or (None,)]
    steps = iter((map if pool is None else pool.map)(partial(_measured, config, ranks), work))
    costs = []
    for place in places:
        some = itertools.islice(steps, len(place.sizes) or 1)
        found = [_in_flight(config, ranks, place, step, number) for step in some]
        wanted = len(stages.layers_of(place.rank)) / stages.schedule.stages_per_rank
        costs.append(_of_rank(_of_layers(found, place.sizes, wanted), place.rank, stages))
    return _worst(costs)


def _of_rank(cost: StepCost, rank: int, stages: PipelineStages) -> StepCost:
    return replace(cost, rank=f"rank {rank + 1} of {stages.num_ranks} of a pipeline")


def _places(config: ExperimentConfig, stages: PipelineStages, number: int) -> list[_Place]:
    """Return the ranks to measure: that which keeps most passes of layers, and that with most layers if far more."""
    P, own, pattern = stages.num_ranks, config.parallel, layer_pattern(config)
    assert own.pp_schedule in PLANNED, "others are not planned"
    per_rank = stages.schedule.stages_per_rank

    def place(rank: int) -> _Place:
        size, index = min(P, 2 if per_rank > 1 else 3), 0
        if rank == P - 1:
            size, index = 2, 1
        elif rank > 0:
            size, index = min(P, size + 1), 1
            index = 1 if size < P else rank
        taken = 2 * size if per_rank > 1 else size + 1
        if pattern is None or number <= taken:
            return _Place(rank=rank, size=P, index=rank, sizes=(), first=number, taken=number)
        sizes = tuple(size - pattern.period for size in pattern.sizes)
        most = max(len(stages.layers[stage]) for stage in stages.of_rank(rank))
        sizes = sizes if most > sizes[1] else (most,)
        return _Place(rank=rank, size=size, index=index, sizes=sizes, first=size, taken=taken)

    layers = [len(stages.layers_of(rank)) for rank in range(P)]
    kept = [kept_layers(own.pp_schedule, stages, rank, number) for rank in range(P)]
    fullest, largest = kept.index(max(kept)), layers.index(max(layers))
    return [place(rank) for rank in (fullest, largest) if rank == fullest or layers[rank] > _FAR_MORE * layers[fullest]]


def _measured(config: ExperimentConfig, ranks: Ranks, work: tuple[_Place, int | None]) -> ProbedStep:
    place, layers = work
    own, model, P = config.parallel, config.model, config.parallel.pp_size
    if layers is not None:
        stages = place.size * SCHEDULES[own.pp_schedule].stages_per_rank
        model = model.model_copy(update={"num_layers": layers * stages})
        own = own.model_copy(update={"pp_size": place.size, "pp_layers": (layers,) * stages})
    shorter = config.model_copy(update={"model": model, "parallel": own})
    ranks = replace(ranks, world_size=ranks.world_size // P * own.pp_size)
    batches = shape_of_batches(shorter, ranks.world_size)[0]
    first, taken = (min(passes * own.at_once, batches) for passes in (place.first, place.taken))
    return fake_rank(shorter, ranks, pp_rank=place.index, micro_batches=(first, taken))


def _in_flight(config: ExperimentConfig, ranks: Ranks, place: _Place, step: ProbedStep, number: int) -> StepCost:
    """Extrapolate a step to all its passes, and to those that are kept at once in the whole pipeline."""
    own, cost, first, taken = config.parallel, cost_of(step), place.first, place.taken
    num_micro_batches = shape_of_batches(config, ranks.world_size)[0]
    here, wanted = (
        kept_passes(own.pp_schedule, size, rank, n)
        for size, rank, n in ((place.size, place.index, taken), (own.pp_size, place.rank, number))
    )
    kept = _kept_bytes(step.forward_starts, here, place.size)
    more = sum(each * (w - h) for each, w, h in zip(kept, wanted, here, strict=True))
    message = _message_bytes(config, ranks)
    num_ends = (place.rank > 0) + (place.rank < own.pp_size - 1)  # neighbours
    buffers = received_buffers(len(here), num_neighbours=num_ends)  # of each pass
    always = max(0, num_micro_batches - taken * own.at_once) * step.batch + (number - taken) * buffers * message
    if len(here) > 1:  # torch keeps what it sent to the end of the step
        more += buffers * message * max(0, number - max(wanted) - (taken - max(here)))
    peaks: dict[Window, int] = {}
    for (phase, _), peak in cost.peaks.items():
        found = peak + always + (more if phase in ("forward", "backward") else 0)
        peaks[phase, None] = max(found, peaks.get((phase, None), 0))
    totals = cost.totals
    if taken > first:
        wanted_passes = num_micro_batches / own.at_once  # the last one may be half a pair
        totals = extrapolated(totals_of(step.first), cost.totals, (wanted_passes - first) / (taken - first))
    resident = cost.resident + always + (taken * buffers * message if taken > first else 0)
    return replace(cost, resident=resident, peaks=peaks, totals=_named(totals, place, own.pp_size, ranks))


def _kept_bytes(starts: Sequence[int], passes: tuple[int, ...], size: int) -> list[int]:
    """Return the bytes that a forward pass of each stage keeps, by the bytes that are alive when passes start.

    They are those of its second pass: the first may gather weights besides. 0 if a backward pass comes before its end.
    """
    seconds = range(1, 1 + size * len(passes), size)
    return [starts[place + 1] - starts[place] if place + 1 < sum(passes) else 0 for place in seconds]


def _message_bytes(config: ExperimentConfig, ranks: Ranks) -> int:
    """Return the bytes of the residual stream of a pass."""
    rows, model = shape_of_batches(config, ranks.world_size)[1], config.model
    width = 8 if config.train.dtype == "float64" else 4
    tokens = config.parallel.at_once * rows * (model.seq_len // config.parallel.cp_size)
    return tokens * model.d_model * width


def _named(totals: Mapping[Quantity, float], place: _Place, pp_size: int, ranks: Ranks) -> Mapping[Quantity, float]:
    """Return totals whose messages between stages go to the ranks that are as far away in the whole pipeline."""
    stage = ranks.world_size // pp_size
    shift = (place.rank - place.index) * stage
    found: dict[Quantity, float] = {}
    for key, value in totals.items():
        members = key.ranks and tuple(rank + shift for rank in key.ranks)
        key = key._replace(ranks=members)
        found[key] = found.get(key, 0) + value
    return found


def _of_layers(costs: Sequence[StepCost], sizes: tuple[int, ...], wanted: float) -> StepCost:
    """Extrapolate from stages of one or two sizes."""
    if len(costs) == 1:
        return costs[0]
    few, many = costs
    step = (wanted - sizes[0]) / (sizes[1] - sizes[0])

    def at(low: float, high: float) -> int:
        return round(low + (high - low) * step)

    return StepCost(
        weights=at(few.weights, many.weights),
        resident=at(few.resident, many.resident),
        peaks={window: at(peak, many.peaks[window]) for window, peak in few.peaks.items()},
        totals=extrapolated(few.totals, many.totals, step),
    )


def _worst(costs: Sequence[StepCost]) -> StepCost:
    """Return the memory of the fullest rank with the work of the busiest."""
    busiest = max(costs, key=lambda cost: cost.total("flops"))
    return replace(max(costs, key=lambda cost: cost.peak), totals=busiest.totals)
