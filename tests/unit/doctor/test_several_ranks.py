"""Several gloo ranks: a slowed one and a slowed link are named (they sleep), and a norm that differs between ranks."""

import statistics
import time
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of_text
from trainer.doctor.cluster import measure_cluster as measuring
from trainer.doctor.cluster.cluster_checks import CLUSTER_CHECKS
from trainer.doctor.cluster.cluster_work import Rank, Workload
from trainer.doctor.cluster.measure_cluster import measure_cluster, pairings
from trainer.doctor.cluster.timed_rounds import COLLECTIVES
from trainer.doctor.cluster.tiny_steps import TinyStep
from trainer.doctor.finding import examine
from trainer.doctor.step.diagnose_step import of_all_ranks
from trainer.doctor.step.measure_step import measure_step
from trainer.doctor.step.step_checks import STEP_CHECKS
from trainer.doctor.step.text_checks import TEXT_CHECKS
from trainer.engine.step import StepEngine
from trainer.experiment import ExperimentConfig
from trainer.moe.routers.bias_balanced import BiasBalancedRouter

TINY = Workload(
    width=64,
    copied=1 << 16,
    sizes=[1 << 10, 1 << 14],
    link=1 << 12,
    burst_s=0.0,
    computed_s=0.0,
    tiny_layers=(1, 2),
    budget_s=0.0,
)
"""Three rounds of next to nothing."""
SLEEP_S = 0.1
RANKS = 3


class SlowRank(Rank):
    """Computes and copies slowly on rank 1."""

    def multiply(self) -> None:
        super().multiply()
        time.sleep(SLEEP_S * (self.world.index == 1))


class SlowLink(Rank):
    """Exchanges slowly between ranks 0 and 2."""

    def exchange(self, partner: int | None, num_bytes: int) -> None:
        super().exchange(partner, num_bytes)
        time.sleep(SLEEP_S * ({partner, self.world.index} == {0, 2}))


def measure(kinds: list[type[Rank]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Measure the ranks once with each kind of work, and return what is found."""
    answers, mesh = [], mesh_here(ranks_per_node=RANKS)
    for kind in kinds:
        measuring.Rank = kind
        workload = TINY if kind is Rank else replace(TINY, tiny_layers=())
        evidence = measure_cluster(mesh, torch.device("cpu"), workload)
        answers.append(([finding.found for finding in examine(CLUSTER_CHECKS, evidence)], asdict(evidence)))
    measuring.Rank = Rank
    return answers


def test_a_slow_rank_and_a_slow_link_are_named_and_all_is_measured(ranks: Ranks) -> None:
    kinds = [Rank, SlowRank, SlowLink]
    of_ranks = ranks.run(RANKS, measure, kinds)
    (_, plain), (slow_rank, _), (slow_link, _) = of_ranks[0]
    assert any(text.startswith("rank 1 on ") and "products" in text for text in slow_rank), slow_rank
    assert any(text.startswith("the link between ranks 0 and 2") for text in slow_link), slow_link
    assert len(plain["ranks"]) == RANKS and all(one["matmul"]["seconds"] for one in plain["ranks"])
    assert [tuple(one["ranks"]) for one in plain["links"]] == list(combinations(range(RANKS), 2))
    assert set(plain["collectives"]) == set(COLLECTIVES)
    for curve in plain["collectives"].values():
        assert [one["num_bytes"] for one in curve] == list(TINY.sizes)
        assert all(len(one["rounds"]["seconds"]) == 3 for one in curve)
    for name, curve in plain["overheads"]["beside"].items():
        alone = [statistics.median(one["rounds"]["seconds"]) for one in plain["collectives"][name]]
        assert all(min(one["rounds"]["seconds"]) >= least for one, least in zip(curve, alone, strict=True))
    assert all(one["gathers"] > 0 < one["reductions"] for one in plain["overheads"]["sharded"])
    assert all(one["gathers"] == 0 == one["reductions"] for one in plain["overheads"]["whole"])
    assert all(one["least_s"] <= 0 <= one["most_s"] for one in plain["clocks"]), "one clock for all of them"
    assert plain["settings"] == {}
    assert all(of_rank[0][1]["links"] == plain["links"] for of_rank in of_ranks), "the same on every rank"


def shard_calls() -> list[tuple[int, int]]:
    """Return how often FSDP2 gathered and reduced in a step, as counted by its operations and by its collectives."""
    steps = [TinyStep(2, mesh_here(), torch.device("cpu"), sharded=sharded) for sharded in (False, True)]
    names = ("allgather_base", "reduce_scatter_base")
    return [(step.operations.shard_calls, sum(map(step.num_collectives, names))) for step in steps]


def test_work_around_shards_is_counted_once_for_each_gather_and_reduction(ranks: Ranks) -> None:
    (none, none_too), (counted, sent) = ranks.run(2, shard_calls)[0]
    assert none == none_too == 0 < counted == sent


def take_steps(configs: dict[str, ExperimentConfig]) -> dict[str, tuple[list[str], int]]:
    """Take a step of each config with its own fault; return what is found, and how many layers were asked."""
    answers, reduced, moved = {}, StepEngine._reduce_sums, BiasBalancedRouter.update

    def local_norm(self: StepEngine, total: Any, choices: Any, routing: Any, square: torch.Tensor) -> Any:
        *sums, _ = reduced(self, total, choices, routing, square)
        return *sums, square

    def apart(self: BiasBalancedRouter, tokens_per_expert: torch.Tensor) -> None:
        moved(self, -tokens_per_expert)

    for name, config in configs.items():
        mesh = mesh_here(**asdict(config.parallel.degrees))
        StepEngine._reduce_sums = local_norm if name == "local norm" else reduced
        BiasBalancedRouter.update = apart if name == "bias apart" else moved
        evidence = measure_step(config, mesh, torch.device("cpu"), warn=lambda _: None)
        found = of_all_ranks(examine((*STEP_CHECKS, *TEXT_CHECKS), evidence), mesh)
        answers[name] = sorted({finding.check for finding in found}), len(evidence.layers)
    StepEngine._reduce_sums, BiasBalancedRouter.update = reduced, moved
    return answers


def test_faults_are_found_on_several_ranks_and_nothing_else(ranks: Ranks, tmp_path: Path) -> None:
    cases = {
        "plain": (["parallel.ep_size=2"], []),
        "copies": (["parallel.ep_size=2", "parallel.placement=round_robin", "parallel.replicas=1"], []),
        "shards": (["parallel.ep_size=2", "parallel.data=shard"], []),
        "one row": (["train.global_batch_size=1", "parallel.pp_schedule=dualpipe_v"], []),
        "parts of rows": (["parallel.cp_size=2"], []),
        "stages": (["parallel.pp_size=2", "parallel.micro_batch_size=1"], []),
        "local norm": (["parallel.ep_size=2"], ["gradient_norm"]),
        "bias apart": (["parallel.ep_size=2", "parallel.data=shard"], ["bias_direction"]),
    }
    configs = {name: config_of_text(tmp_path, *overrides) for name, (overrides, _) in cases.items()}
    first, second = ranks.run(2, take_steps, configs)
    assert first == second
    assert {name: found for name, (found, _) in first.items()} == {name: found for name, (_, found) in cases.items()}
    assert {name for name, (_, layers) in first.items() if layers != 2} == {"parts of rows", "stages"}


def test_pairs_meet_once_and_disjoint() -> None:
    for size in (3, 16, 17, 20, 33, 64):
        rounds = list(pairings(size, 8))
        pairs = [pair for one in rounds for pair in one]
        assert sorted(pairs) == list(combinations(range(size), 2))
        assert all(len({rank for pair in one for rank in pair}) == 2 * len(one) for one in rounds)
        assert len(rounds) == (len(pairs) if size <= 16 else size - 1 + size % 2)


def test_very_many_ranks_meet_within_machines_and_by_their_first() -> None:
    rounds = list(pairings(512, 8))
    pairs = [pair for one in rounds for pair in one]
    assert len(pairs) == len(set(pairs)) and len(rounds) == 7 + 63
    inside = {pair for pair in pairs if pair[0] // 8 == pair[1] // 8}
    assert len(inside) == 64 * 28
    assert sorted(set(pairs) - inside) == list(combinations(range(0, 512, 8), 2))
