"""Pipelines that are measured by shorter ones, and what a schedule keeps."""

import pytest

from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.plan.kept_passes import kept_passes
from trainer.plan.measure_layout import measure_layout
from trainer.plan.measured_rank import Ranks

SHAPE = [
    *("model.d_model=16", "model.num_heads=2", "model.seq_len=8", "model.moe.d_ff=16", "parallel.micro_batch_size=1"),
    *("train.global_batch_size=4", "model.moe.balance.counts=previous_step", "parallel.recompute=block"),
]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("pp_size", "overrides"),
    [
        (4, ["model.num_layers=8"]),
        (2, ["model.num_layers=8", "parallel.pp_schedule=interleaved_1f1b", "parallel.data=shard"]),
        (
            2,
            [
                *("model.num_layers=6", "parallel.ep_size=2", "parallel.overlap=micro_batches"),
                *("train.global_batch_size=16", "model.moe.num_experts=2"),
            ],
        ),
    ],
)
def test_a_pipeline_needs_what_a_shorter_one_tells(pp_size: int, overrides: list[str]) -> None:
    config = load("configs/quickstart.yaml", [*SHAPE, *overrides, f"parallel.pp_size={pp_size}"], ExperimentConfig)
    world_size = pp_size * config.parallel.ep_size
    ranks = Ranks(world_size=world_size, per_node=world_size, device="cpu")
    short, whole = (measure_layout(config, ranks, whole=is_whole) for is_whole in (False, True))
    assert short.peak == pytest.approx(whole.peak, rel=0.01)
    assert short.total("flops") == whole.total("flops")
    assert short.total("bytes", "send") == pytest.approx(whole.total("bytes", "send"), rel=0.01)


def test_the_first_rank_keeps_most_and_a_second_stage_half_as_much_more() -> None:
    assert [kept_passes("1f1b", 4, rank, 9) for rank in range(4)] == [(4,), (3,), (2,), (1,)]
    assert kept_passes("1f1b", 4, 0, 2) == (2,)
    assert [kept_passes("interleaved_1f1b", 4, rank, 8) for rank in (0, 3)] == [(7, 4), (4, 1)]
    assert kept_passes("gpipe", 4, 3, 8) == (8,)
