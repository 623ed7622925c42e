"""Measure a layout by fake steps: memory of the busiest rank, and everything that it computes and sends."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial

from trainer.distributed.rank_layout import Layout, check_layout
from trainer.experiment import ExperimentConfig
from trainer.plan.fake_step import fake_step, load_of
from trainer.plan.layer_pattern import layer_pattern
from trainer.plan.step_cost import StepCost, cost_of, with_layers, with_micro_batches
from trainer.plan.step_probe import shape_of_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Ranks to measure for, and what is assumed about their load."""

    world_size: int
    per_node: int
    device: str
    imbalance: float = 1.0
    """Rows of the busiest rank, times the mean."""
    shares: Sequence[float] = ()
    """(E,) recorded shares of the experts; empty: skewed by the imbalance."""


def measure_layout(
    config: ExperimentConfig, ranks: Ranks, *, whole: bool = False, pool: Executor | None = None
) -> StepCost:
    """Return the cost of a step of the rank that has most rows.

    Of a deep model and of many micro-batches, two sizes of each are measured, at the same time if there is a pool, and
    the rest is extrapolated, unless it is to be measured as a whole.
    """
    own = config.parallel
    check_layout(own.degrees, world_size=ranks.world_size)
    pattern = None if whole else layer_pattern(config)
    if pattern is None:
        return _measured(config, ranks, whole=whole)
    smaller = [_of_layers(config, size) for size in pattern.sizes]
    few, many = (map if pool is None else pool.map)(partial(_measured, ranks=ranks, whole=whole), smaller)
    return with_layers(few, many, pattern, config.model.num_layers)


def _measured(config: ExperimentConfig, ranks: Ranks, *, whole: bool) -> StepCost:
    own, num_batches = config.parallel, shape_of_batches(config, ranks.world_size)[0]
    load = load_of(config, own.ep_size, ranks.imbalance, ranks.shares)
    layout = Layout(
        world_size=ranks.world_size,
        rank=0 if load is None else load.busiest_rank(own.ep_size),
        ranks_per_node=ranks.per_node,
        **asdict(own.degrees),
    )
    # Steps of one are different: they need no counting pass, and no gradients are accumulated. Pairs are units.
    unit = 2 if own.overlaps else 1
    taken = num_batches if whole or num_batches <= 3 * unit else 3 * unit - num_batches % unit
    step = fake_step(config, layout, load, device=ranks.device, micro_batches=(max(1, taken - unit), taken))
    return cost_of(step) if taken == num_batches else with_micro_batches(step, taken, num_batches, unit=unit)


def _of_layers(config: ExperimentConfig, num_layers: int) -> ExperimentConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": num_layers})})
