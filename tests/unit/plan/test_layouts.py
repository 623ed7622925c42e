"""Layouts that are possible, and those that have no room."""

import pytest

from trainer.config.loader import load
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.plan.gpus import GPUS, gpu_named
from trainer.plan.layout_estimates import estimated_time, least_state_bytes
from trainer.plan.layouts import Choices, Cluster, PlannedLayout, layouts_of

CONFIG = load("configs/quickstart.yaml", ["train.global_batch_size=64"], ExperimentConfig)


def cluster(world_size: int, per_node: int = 8) -> Cluster:
    gpu = gpu_named("h100")
    return Cluster(world_size, per_node, gpu, gpu.usable)


def test_every_layout_is_allowed_and_all_sizes_of_experts_are_there() -> None:
    found = list(layouts_of(CONFIG, cluster(16), Choices()))
    assert {layout.ep_size for layout in found} == {1, 2, 4, 8}
    assert {layout.micro_batch_size for layout in found} == {1, 2, 4}
    assert {(layout.data, layout.shard_size) for layout in found} == {
        ("replicate", None),
        ("shard", None),
        ("shard", 8),
    }
    assert {layout.zero_stage for layout in found if layout.engine == "deepspeed"} == {1, 2}
    assert len(set(found)) == len(found)
    for layout in found[::7]:
        assert layout.applied(CONFIG) is not None


def test_a_layout_is_the_config_with_its_own_keys_changed() -> None:
    layout = PlannedLayout(ep_size=2, data="shard", recompute="block", micro_batch_size=4, shard_keeps="weights")
    config = layout.applied(CONFIG)
    assert config is not None and config.model == CONFIG.model and config.train == CONFIG.train
    assert (config.parallel.ep_size, config.parallel.recompute, config.parallel.shard_keeps) == (2, "block", "weights")
    assert PlannedLayout(data="shard", engine="deepspeed").applied(CONFIG) is None


def test_hops_over_nodes_are_tried_where_experts_span_them() -> None:
    found = list(layouts_of(CONFIG, cluster(16, per_node=2), Choices(ep_sizes=[2, 4])))
    assert {layout.hierarchical for layout in found if layout.ep_size == 2} == {False}
    assert {layout.hierarchical for layout in found if layout.ep_size == 4} == {False, True}


def test_stages_and_shared_rows_are_tried_where_layers_and_rows_allow_them() -> None:
    found = list(layouts_of(CONFIG, cluster(16), Choices(engines=["native"])))
    assert {(one.pp_size, one.pp_schedule) for one in found if one.pp_size > 1} == {
        *((2, "1f1b"), (2, "interleaved_1f1b"), (4, "1f1b")),
    }
    assert all(one.micro_batches(CONFIG, 16) >= one.pp_size for one in found)
    assert {one.ep_size for one in found if one.pp_size == 4} == {1, 2, 4}, "experts are within a stage"
    assert {one.cp_size for one in found} == {1}, "rows of 128 tokens"
    long = load("configs/quickstart.yaml", ["model.seq_len=8192", "train.global_batch_size=64"], ExperimentConfig)
    shared = {(one.cp, one.cp_size, one.micro_batch_size) for one in layouts_of(long, cluster(16), Choices())}
    assert {one for one in shared if one[1] > 1} == {("ulysses", 2, 1), ("ulysses", 4, 1), ("ring", 8, 1)}
    for one in [*layouts_of(long, cluster(16), Choices())][::5] + found[::5]:
        assert one.applied(long if one.cp_size > 1 else CONFIG) is not None, one


def test_a_pipeline_is_idle_while_it_fills_and_half_as_long_with_two_stages_on_a_rank() -> None:
    one, two = (PlannedLayout(pp_size=4, pp_schedule=name) for name in ("1f1b", "interleaved_1f1b"))
    assert (one.idle(12), two.idle(12), PlannedLayout().idle(12)) == (0.25, 0.125, 0.0)
    states = [least_state_bytes(CONFIG, PlannedLayout(pp_size=size), 16, 256) for size in (1, 4)]
    assert states[0] == pytest.approx(4 * states[1], rel=1e-3)


def test_more_sharing_needs_less_and_more_rows_surely_need_more() -> None:
    whole = PlannedLayout()
    sharded = PlannedLayout(data="shard", micro_batch_size=8)
    sizes = [
        least_state_bytes(CONFIG, layout, 8, 256)
        for layout in (whole, PlannedLayout(ep_size=2), PlannedLayout(ep_size=8), sharded)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == pytest.approx(8 * sizes[3], rel=1e-6)
    kept = [
        least_state_bytes(CONFIG, PlannedLayout(data="shard", shard_keeps=keeps), 8, 256)
        for keeps in ("nothing", "gradients", "weights")
    ]
    assert sizes[3] == kept[0] < kept[1] < kept[2], "of several micro-batches"
    less = PlannedLayout(recompute="block", micro_batch_size=2)
    assert PlannedLayout(recompute="experts", micro_batch_size=4).contains(less)
    assert not less.contains(PlannedLayout(recompute="experts", micro_batch_size=2))
    assert not PlannedLayout(ep_size=2, micro_batch_size=8).contains(less)


def test_the_estimate_prefers_work_that_is_done_once() -> None:
    times = [
        estimated_time(CONFIG, PlannedLayout(recompute=name, micro_batch_size=4), cluster(16), 256).total()
        for name in ("none", "norms_and_activations", "experts", "block")
    ]
    assert times == sorted(times)


def test_the_estimate_of_a_cpu_prefers_few_operations() -> None:
    own = cluster(2)._replace(gpu=gpu_named("cpu"))
    times = [estimated_time(CONFIG, PlannedLayout(micro_batch_size=size), own, 256).total() for size in (32, 8, 2, 1)]
    assert times == sorted(set(times))


def test_an_unknown_device_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="--gpu: 'H1000' is not in the table; use one of A100, H100, H200, B200"):
        gpu_named("H1000")
    assert all(gpu.source and 0 < gpu.usable <= gpu.memory for gpu in GPUS.values())
