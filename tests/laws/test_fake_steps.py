"""Law: a fake step needs the bytes, and sends the messages, that the same step on real ranks does."""

from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from trainer.config.loader import load
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import Layout
from trainer.experiment import ExperimentConfig
from trainer.plan.fake_ranks import fake_mesh, fake_tensors
from trainer.plan.fake_step import load_of, runnable
from trainer.plan.step_probe import ProbedStep, ProbeOptions, WindowRecorder, probe_step
from trainer.plan.tensor_bytes import OverLimit

TINY = [
    *("model.num_layers=2", "model.d_model=16", "model.num_heads=2", "model.seq_len=8", "model.moe.d_ff=16"),
    *("train.global_batch_size=8", "parallel.micro_batch_size=2"),
]
BY_NUMBER = "model.moe.router={kind: round_robin, top_k: 2}"
"""Routing that depends on no values, so that both steps have the same rows."""
OF_TWO = {
    "replicate": ["parallel.recompute=block"],
    "shard, nothing kept": ["parallel.data=shard", "parallel.shard_keeps=nothing"],
    "experts, sharded": ["parallel.ep_size=2", "parallel.data=shard", "parallel.shard_keeps=weights"],
    "deduplicated": ["parallel.ep_size=2", "parallel.dispatcher={kind: deduplicated_all_to_all}"],
    "gathered": ["parallel.ep_size=2", "parallel.dispatcher={kind: all_gather}", "parallel.recompute=experts"],
    "padded": ["parallel.ep_size=2", "model.moe.capacity.factor=1.5", "parallel.dispatcher.kind=padded_all_to_all"],
    "overlapped": ["parallel.ep_size=2", "parallel.overlap=micro_batches", "parallel.recompute=norms_and_activations"],
    "heads": ["parallel.tp_size=2", "parallel.ep_size=2", "model.moe.first_dense_layers=1"],
    "ZeRO 2": ["engine={kind: deepspeed, zero_stage: 2}", "parallel.ep_size=2"],
}
STAGES = ["parallel.pp_size=2", "model.num_layers=4", "parallel.micro_batch_size=1", "train.global_batch_size=4"]
OF_STAGES = {
    "gpipe": [*STAGES, "parallel.pp_schedule=gpipe", "model.tie_embeddings=false"],
    "1f1b": [*STAGES, "parallel.recompute=block"],
    "interleaved": [*STAGES, "parallel.pp_schedule=interleaved_1f1b", "model.moe.balance.counts=previous_step"],
    "there and back": [*STAGES, "parallel.pp_schedule=zbv"],
    "dualpipe": [*STAGES, "parallel.pp_schedule=dualpipe_v"],
}
OF_FOUR = {
    "copies of shards": ["parallel.data=shard", "parallel.shard_size=2", "parallel.ep_size=2"],
    "rows shared by heads": ["parallel.cp_size=2", "parallel.ep_size=4", "model.moe.balance.scope=sequence"],
    "heads, sharded": [
        *("parallel.tp_size=2", "parallel.data=shard", "parallel.recompute=norms_and_activations"),
        "model.num_kv_heads=1",  # on both ranks
    ],
    "rows shared in a ring": ["parallel.cp_size=4", "parallel.cp=ring", "parallel.recompute=block"],
    "experts over a stage": [*STAGES, "parallel.ep_size=2", "parallel.data=shard", "parallel.shard_keeps=weights"],
    "stages whose micro-batches overlap": [
        *(*STAGES, "train.global_batch_size=6"),  # two pairs for a rank
        *("parallel.ep_size=2", "parallel.overlap=micro_batches"),
    ],
    "four stages": [*STAGES, "parallel.pp_size=4"],  # last: torch names groups by how many there were
}


def config_of(overrides: list[str], router: str = BY_NUMBER) -> ExperimentConfig:
    return runnable(load("configs/quickstart.yaml", [*TINY, router, *overrides], ExperimentConfig), "cpu")


def real_steps(cases: list[list[str]], router: str = BY_NUMBER) -> list[ProbedStep]:
    steps = []
    for overrides in cases:
        config = config_of(overrides, router)
        own = config.parallel
        mesh = mesh_here(**asdict(own.degrees), recorder=WindowRecorder())
        steps.append(probe_step(config, mesh, torch.device("cpu"), ProbeOptions(num_ids=256, seed=1)))
    return steps


def fake_one(overrides: list[str], world_size: int, router: str = BY_NUMBER, rank: int = 0, **more: Any) -> ProbedStep:
    config = config_of(overrides, router)
    own = config.parallel
    layout = Layout(world_size=world_size, rank=rank, **asdict(own.degrees))
    with fake_mesh(layout) as mesh, fake_tensors(load_of(config, own.ep_size, 1.0)):
        return probe_step(config, mesh, torch.device("cpu"), ProbeOptions(num_ids=256, **more))


def check_equal(real: ProbedStep, fake: ProbedStep, name: str) -> None:
    assert (fake.weights, fake.resident) == (real.weights, real.resident), name
    assert fake.operations.collectives == real.operations.collectives, name
    assert fake.operations.flops == real.operations.flops > 0, name
    assert fake.peak == pytest.approx(real.peak, rel=0.01), name


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "world_size"), [*product(OF_TWO, [2]), *product(OF_STAGES, [2]), *product(OF_FOUR, [4])]
)
def test_bytes_and_messages_are_those_of_real_ranks(ranks: Ranks, name: str, world_size: int) -> None:
    overrides = (OF_TWO | OF_STAGES | OF_FOUR)[name]
    real = ranks.run(world_size, real_steps, [overrides])
    firsts = range(0, world_size, world_size // config_of(overrides).parallel.pp_size)
    for rank in firsts:  # of each stage
        check_equal(real[rank][0], fake_one(overrides, world_size, rank=rank), f"{name}, rank {rank}")


def test_activations_of_two_micro_batches_that_overlap_are_counted() -> None:
    kept = {}
    for overlap in ("none", "micro_batches"):
        step = fake_one(["parallel.ep_size=2", "model.seq_len=512", f"parallel.overlap={overlap}"], 2)
        kept[overlap] = step.peak - step.resident
    assert 1.5 < kept["micro_batches"] / kept["none"] < 2


def test_routing_by_values_needs_the_bytes_of_an_even_load(ranks: Ranks) -> None:
    router = "model.moe.router={kind: top_k, top_k: 2}"
    real = ranks.run(2, real_steps, [["parallel.ep_size=2"]], router)
    fake = fake_one(["parallel.ep_size=2"], 2, router)
    assert fake.operations.flops == pytest.approx(real[0][0].operations.flops, rel=0.15)
    assert (real[0][0].peak + real[1][0].peak) / 2 == pytest.approx(fake.peak, rel=0.05)


def test_a_step_fails_with_a_byte_less_than_the_plan_says() -> None:
    config, fake = config_of([]), fake_one([], 1)
    recorder = WindowRecorder()
    whole = probe_step(config, Mesh.of_one(recorder), torch.device("cpu"), ProbeOptions(num_ids=256, seed=1))
    assert whole.peak == fake.peak
    with pytest.raises(OverLimit):
        less = ProbeOptions(num_ids=256, seed=1, limit=fake.peak - 1)
        probe_step(config, Mesh.of_one(WindowRecorder()), torch.device("cpu"), less)
