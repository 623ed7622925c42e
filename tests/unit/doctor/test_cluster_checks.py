"""A slow rank, a slow link, a wrong clock and another setting are named; noise names nobody."""

import random
from dataclasses import replace
from itertools import combinations

import pytest

from trainer.doctor.cluster.cluster_checks import CLUSTER_CHECKS
from trainer.doctor.cluster.cluster_evidence import (
    ClockOffset,
    ClusterEvidence,
    LinkSpeed,
    RankSpeed,
)
from trainer.doctor.cluster.cluster_lines import cluster_lines
from trainer.doctor.cluster.timed_rounds import COLLECTIVES, CollectiveSpeed, Rounds
from trainer.doctor.finding import DoctorFinding, examine


def cluster(seed: int, *, ranks: int = 8, per_node: int = 4, noise: float = 0.4) -> ClusterEvidence:
    """Return a cluster whose rounds are disturbed: some take up to four times as long."""
    draw = random.Random(seed)

    def rounds(usual: float) -> Rounds:
        times = [usual * (1 + noise * draw.random()) * (4 if draw.random() < 0.2 else 1) for _ in range(9)]
        return Rounds(seconds=times)

    return ClusterEvidence(
        ranks=[
            RankSpeed(
                rank=rank, host=f"host{rank // per_node}", node=rank // per_node, matmul=rounds(0.01), copy=rounds(0.02)
            )
            for rank in range(ranks)
        ],
        links=[
            LinkSpeed(
                ranks=(a, b),
                nodes=(a // per_node, b // per_node),
                exchange=rounds(0.001 if a // per_node == b // per_node else 0.01),
                latency=rounds(1e-5 if a // per_node == b // per_node else 1e-4),
            )
            for a, b in combinations(range(ranks), 2)
        ],
        collectives={
            name: [CollectiveSpeed(num_bytes=1024, rounds=rounds(0.001 * number))]
            for number, name in enumerate(COLLECTIVES, start=1)
        },
        clocks=[ClockOffset(rank=rank, least_s=-0.001, most_s=0.001) for rank in range(1, ranks)],
        matmul_flops=1e9,
        copy_bytes=1e8,
        link_bytes=1 << 20,
    )


def slowed(rounds: Rounds, factor: float) -> Rounds:
    return Rounds(seconds=[factor * one for one in rounds.seconds])


def found(evidence: ClusterEvidence) -> list[DoctorFinding]:
    return examine(CLUSTER_CHECKS, evidence)


@pytest.mark.parametrize("seed", range(10))
def test_noise_names_nobody_and_a_slow_rank_is_named(seed: int) -> None:
    calm = cluster(seed)
    assert found(calm) == []
    ranks = [replace(one, matmul=slowed(one.matmul, 2.0)) if one.rank == 5 else one for one in calm.ranks]
    [finding] = found(replace(calm, ranks=ranks))
    assert finding.check == "slow_rank" and "rank 5 on host1: products" in finding.found


@pytest.mark.parametrize("seed", range(10))
def test_a_slow_link_is_named_among_those_of_its_kind(seed: int) -> None:
    calm = cluster(seed)
    links = [replace(one, exchange=slowed(one.exchange, 4.0)) if one.ranks == (1, 2) else one for one in calm.links]
    [finding] = found(replace(calm, links=links))
    assert finding.check == "slow_link" and "between ranks 1 and 2" in finding.found, "faster than those of machines"


def test_a_rank_whose_links_are_all_slow_is_named_once() -> None:
    calm = cluster(1)
    links = [replace(one, latency=slowed(one.latency, 9.0)) if 3 in one.ranks else one for one in calm.links]
    [finding] = found(replace(calm, links=links))
    assert finding.found.startswith("all links of rank 3 are slow")


def test_a_clock_is_wrong_only_if_its_bounds_say_so() -> None:
    calm = cluster(2)
    unsure = [ClockOffset(rank=1, least_s=-3.0, most_s=3.0), ClockOffset(rank=2, least_s=-9.0, most_s=-7.5)]
    [finding] = found(replace(calm, clocks=unsure))
    assert finding.check == "skewed_clocks" and "rank 2 is 7.5 s behind" in finding.found


def test_a_setting_that_differs_is_named_with_its_rank() -> None:
    values = [None] * 6 + ["1", None]
    [finding] = found(replace(cluster(3), settings={"NCCL_IB_DISABLE": values}))
    assert finding.found == "NCCL_IB_DISABLE is '1' on rank 6, and None on the others"


def test_the_record_has_what_a_plan_reads_and_the_screen_the_same() -> None:
    evidence = cluster(4)
    record = evidence.record()
    assert record["schema"] == 1 and record["ranks"] == 8
    assert record["all_reduce"] == [{"bytes": 1024, "seconds": evidence.collectives["all_reduce"][0].rounds.median}]
    assert {"all_to_all", "matmul_flops_per_s", "memory_bytes_per_s"} <= record.keys()
    assert len(record["by_rank"]) == 8 and len(record["links"]) == 28
    lines = list(cluster_lines(evidence))
    assert lines[0].split()[0] == "rank" and any(line.startswith("between machines") for line in lines)
