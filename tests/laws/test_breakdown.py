"""The parts of a step are measured wherever they are computed, and make up the step."""

from typing import Any

import pytest

from tests.builders import make_batch, make_engine_of, rows_of, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.registry import NativeEngineConfig
from trainer.metrics.throughput import Throughput, ThroughputMeter
from trainer.parallel.config import ParallelConfig

WORK = {"forward", "dispatch", "experts", "combine", "backward", "optimizer"}
"""Of every step of a model with experts."""


def _step(parallel: dict[str, Any], engine: str = "native", ep_size: int = 2) -> Throughput:
    """Take a step of two micro-batches on this rank."""
    mesh = mesh_here(ep_size=ep_size)
    section = NativeEngineConfig() if engine == "native" else DeepSpeedEngineConfig()
    config = ParallelConfig.model_validate({"ep_size": ep_size, **parallel})
    made = make_engine_of(section, tiny_model_config({"capacity": {"factor": 2.0}}), mesh=mesh, parallel=config)
    batch = make_batch(4, 8, first_sample=4 * mesh.layout.rank)
    pace = ThroughputMeter(mesh.world.recorder.step_timer)
    for _ in range(2):
        pace.begin()
        made.train_step([rows_of(batch, 0, 2), rows_of(batch, 2, 4)], lr=1e-3)
        pace.end(num_tokens=32)
    made.eval_loss(batch, dropless=True)  # between two steps: not measured
    speed = pace.take()
    made.close()
    return speed


@pytest.mark.parametrize(
    "parallel",
    [
        {"dispatcher": {"kind": "all_to_all"}},
        {"dispatcher": {"kind": "all_to_all", "chunks": 2}},
        {"dispatcher": {"kind": "padded_all_to_all"}},
        {"dispatcher": {"kind": "all_gather"}},
        {"dispatcher": {"kind": "all_gather", "chunks": 2}},
        {"dispatcher": {"kind": "hierarchical"}},
        {"dispatcher": {"kind": "all_to_all"}, "data": "shard"},
    ],
    ids=str,
)
def test_every_dispatcher_says_where_the_time_of_a_step_goes(ranks: Ranks, parallel: dict[str, Any]):
    for speed in ranks.run(2, _step, parallel):
        assert all(speed.parts[part] > 0 for part in (*WORK, "communication")), speed.parts
        assert sum(speed.parts.values()) == pytest.approx(speed.step_s)


def test_so_does_one_process_that_waits_for_nobody(ranks: Ranks):
    (speed,) = ranks.run(1, _step, {}, "native", 1)
    assert all(speed.parts[part] > 0 for part in WORK), speed.parts
    assert speed.parts["communication"] == 0.0
    assert sum(speed.parts.values()) == pytest.approx(speed.step_s)


def test_so_does_deepspeed(ranks: Ranks):
    for speed in ranks.run(2, _step, {}, "deepspeed"):
        assert all(speed.parts[part] > 0 for part in (*WORK, "communication")), speed.parts
        assert sum(speed.parts.values()) == pytest.approx(speed.step_s)
