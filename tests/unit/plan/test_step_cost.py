"""Extrapolation of a step to more layers and micro-batches."""

import pytest

from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.plan.layer_pattern import LayerPattern, layer_pattern
from trainer.plan.layout_estimates import least_row_bytes
from trainer.plan.layouts import RECOMPUTES, PlannedLayout
from trainer.plan.measure_layout import measure_layout
from trainer.plan.measured_rank import Ranks
from trainer.plan.step_cost import with_layers

SHAPE = [
    *("model.d_model=16", "model.num_heads=2", "model.seq_len=8", "model.moe.d_ff=16", "model.num_layers=4"),
    *("train.global_batch_size=8", "parallel.micro_batch_size=1"),
]
TWO = Ranks(world_size=2, per_node=2, device="cpu")
CASES = {
    "alike": (LayerPattern(0, 1), ["parallel.data=shard", "parallel.ep_size=2"]),
    "every second, counts of the step before": (
        LayerPattern(0, 2),
        [
            *("model.moe.every=2", "parallel.recompute={every: 2}", "parallel.data=shard", "model.num_layers=8"),
            # All of its micro-batches are taken.
            *("model.moe.balance.counts=previous_step", "train.global_batch_size=6"),
        ],
    ),
}


def of_layers(overrides: list[str], *number: int) -> ExperimentConfig:
    return load(
        "configs/quickstart.yaml", [*SHAPE, *overrides, *(f"model.num_layers={n}" for n in number)], ExperimentConfig
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("pattern", "overrides"), CASES.values(), ids=CASES)
def test_what_is_extrapolated_is_what_the_whole_model_needs(pattern: LayerPattern, overrides: list[str]) -> None:
    config = of_layers(overrides)
    assert layer_pattern(of_layers(overrides, 48)) == pattern
    fewer, more = (measure_layout(of_layers(overrides, number), TWO) for number in pattern.sizes)
    short = with_layers(fewer, more, pattern, config.model.num_layers)
    whole = measure_layout(config, TWO, whole=True)
    assert (short.weights, short.resident) == (whole.weights, whole.resident)
    assert short.peak == pytest.approx(whole.peak, rel=1e-3)
    for unit in ("calls", "bytes", "messages", "flops"):
        assert short.total(unit) == whole.total(unit), unit
    for unit in ("moved", "operations"):  # sharding prepares something in its first step
        assert short.total(unit) == pytest.approx(whole.total(unit), rel=0.06), unit


def test_a_model_of_as_few_layers_as_both_sizes_is_measured_whole() -> None:
    five, six = (load("configs/quickstart.yaml", [f"model.num_layers={n}"], ExperimentConfig) for n in (5, 6))
    assert layer_pattern(five) is None and layer_pattern(six) is not None


def test_layers_that_have_names_of_their_own_are_not_extrapolated() -> None:
    config = load("configs/quickstart.yaml", [*SHAPE, "model.moe.layers=[1, 3]"], ExperimentConfig)
    assert layer_pattern(config) is None


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_a_row_needs_at_least_what_layouts_are_excluded_by(recompute: str, ep_size: int) -> None:
    layout = PlannedLayout(recompute=recompute, ep_size=ep_size, micro_batch_size=64)  # weights hardly matter
    dtype = "bfloat16" if recompute == "none" else "float32"
    overrides = [*SHAPE, f"train.dtype={dtype}", f"train.global_batch_size={64 * ep_size}"]
    config = layout.applied(load("configs/quickstart.yaml", overrides, ExperimentConfig))
    assert config is not None
    cost = measure_layout(config, Ranks(world_size=ep_size, per_node=ep_size, device="cuda"), whole=True)
    assert 0 < least_row_bytes(config, layout) * 64 <= cost.peak - cost.resident
