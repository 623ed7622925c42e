"""Measure a layout by fake steps: memory of the busiest rank, and everything that it computes and sends."""

from concurrent.futures import Executor
from functools import partial

from trainer.distributed.rank_layout import check_layout
from trainer.experiment import ExperimentConfig
from trainer.plan.layer_pattern import layer_pattern
from trainer.plan.measured_rank import Ranks, fake_rank
from trainer.plan.step_cost import StepCost, cost_of, with_layers, with_micro_batches
from trainer.plan.step_probe import shape_of_batches


def measure_layout(
    config: ExperimentConfig, ranks: Ranks, *, whole: bool = False, pool: Executor | None = None
) -> StepCost:
    """Return the cost of a step of the rank that has most rows.

    Of a deep model and of many micro-batches, two sizes of each are measured, at the same time if there is a pool, and
    the rest is extrapolated, unless it is to be measured as a whole.
    """
    check_layout(config.parallel.degrees, world_size=ranks.world_size)
    if config.parallel.pp_size > 1:
        from trainer.plan.measure_stages import measure_stages

        return measure_stages(config, ranks, whole=whole, pool=pool)
    pattern = None if whole else layer_pattern(config)
    if pattern is None:
        return _measured(config, ranks, whole=whole)
    smaller = [_of_layers(config, size) for size in pattern.sizes]
    few, many = (map if pool is None else pool.map)(partial(_measured, ranks=ranks, whole=whole), smaller)
    return with_layers(few, many, pattern, config.model.num_layers)


def _measured(config: ExperimentConfig, ranks: Ranks, *, whole: bool) -> StepCost:
    num_batches = shape_of_batches(config, ranks.world_size)[0]
    # Steps of one are different: they need no counting pass, and no gradients are accumulated. Pairs are units.
    unit = config.parallel.at_once
    taken = num_batches if whole or num_batches <= 3 * unit else 3 * unit - num_batches % unit
    step = fake_rank(config, ranks, micro_batches=(max(1, taken - unit), taken))
    return cost_of(step) if taken == num_batches else with_micro_batches(step, taken, num_batches, unit=unit)


def _of_layers(config: ExperimentConfig, num_layers: int) -> ExperimentConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": num_layers})})
