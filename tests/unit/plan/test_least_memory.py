"""Bounds of memory hold for measured layouts, and are close."""

import pytest

from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.plan.gpus import gpu_named
from trainer.plan.layouts import Cluster, PlannedLayout
from trainer.plan.least_memory import LeastMemory
from trainer.plan.measure_layout import measure_layout
from trainer.plan.measured_rank import Ranks
from trainer.plan.step_cost import StepCost

SHAPE = [
    *("model.d_model=64", "model.num_heads=2", "model.seq_len=16", "model.moe.d_ff=128", "model.num_layers=4"),
    "train.global_batch_size=32",
]
CONFIG = load("configs/quickstart.yaml", SHAPE, ExperimentConfig)
CLUSTER = Cluster(8, 4, gpu_named("H100"), 1 << 62)
LAYOUTS = [
    PlannedLayout(data="shard", shard_keeps="gradients", recompute="norms_and_activations", micro_batch_size=4),
    PlannedLayout(data="shard", shard_keeps="nothing", recompute="block"),
    PlannedLayout(ep_size=2, data="shard", shard_keeps="weights"),
    PlannedLayout(pp_size=2, data="shard", shard_keeps="nothing", recompute="experts"),
    PlannedLayout(ep_size=4, pp_size=2, pp_schedule="interleaved_1f1b", micro_batch_size=4),
    PlannedLayout(ep_size=4, engine="deepspeed", zero_stage=1, micro_batch_size=4),
    PlannedLayout(engine="deepspeed", zero_stage=2, recompute="experts", micro_batch_size=2),
]


@pytest.mark.one_in(7)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: f"{one.ep_size} {one.groups} {one.sharding}")
def test_no_layout_needs_less_than_its_bound_nor_far_more(layout: PlannedLayout) -> None:
    applied = layout.applied(CONFIG)
    assert applied is not None
    peak = measure_layout(applied, Ranks(world_size=8, per_node=4, device="cuda"), whole=True).peak
    assert 0.4 * peak < LeastMemory(CONFIG, CLUSTER, 256).surely(layout) <= peak


def test_a_measured_layout_tells_what_others_of_its_kind_probably_need() -> None:
    many = load("configs/quickstart.yaml", [*SHAPE, "train.global_batch_size=128"], ExperimentConfig)
    memory = LeastMemory(many, CLUSTER, 256)
    fewer, some, more = (PlannedLayout(data="shard", micro_batch_size=size) for size in (1, 2, 4))
    other = PlannedLayout(data="shard", micro_batch_size=2, recompute="block")
    before = [memory.probable(layout) for layout in (fewer, some, more, other)]
    peak = round(3 * before[1])
    memory.learn(some, StepCost(weights=0, resident=0, peaks={("forward", None): peak}, totals={}))
    after = [memory.probable(layout) for layout in (fewer, some, more, other)]
    assert before[0] < after[0] < after[1] == pytest.approx(peak) and after[2] > after[1]
    assert after[3] == before[3]


def test_the_largest_stage_is_told_by_its_layers() -> None:
    memory = LeastMemory(CONFIG, CLUSTER, 256)
    assert memory.largest_share(PlannedLayout()) == 1.0 <= memory.largest_share(PlannedLayout(pp_size=2))
