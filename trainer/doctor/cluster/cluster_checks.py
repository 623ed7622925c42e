"""Checks of a cluster: what is slower than its like, in every round. Import no torch.

An outlier is slower than the usual of its kind by a factor, and even its best round is slower than that usual: a
disturbance of some rounds names nobody.
"""

import statistics
from collections.abc import Iterator, Sequence

from trainer.console import formatting
from trainer.doctor.cluster.cluster_evidence import ClusterCheck, ClusterEvidence, LinkSpeed, RankSpeed
from trainer.doctor.cluster.timed_rounds import Rounds
from trainer.doctor.finding import Sign

_SLOW_RANK = 1.25
_SLOW_LINK, _LATE_LINK = 2.0, 3.0
_MOST_SKEW_S = 1.0


def _is_outlier(rounds: Rounds, others: Sequence[Rounds], factor: float) -> float | None:
    """Return how many times the usual time of the others it takes; None if it is no outlier.

    Of two medians the higher one is usual: what most are is no outlier.
    """
    if not others:
        return None
    usual = statistics.median_high(other.median for other in others)
    return rounds.times_slower(usual, factor)


def _slow_ranks(cluster: ClusterEvidence) -> Iterator[Sign]:
    for rank in cluster.ranks:
        others = [other for other in cluster.ranks if other.rank != rank.rank]
        for what, mine, theirs in (
            ("products", rank.matmul, [other.matmul for other in others]),
            ("copies in memory", rank.copy, [other.copy for other in others]),
        ):
            if (ratio := _is_outlier(mine, theirs, _SLOW_RANK)) is not None:
                yield Sign(
                    f"rank {rank.rank} on {rank.host}: {what} take {ratio:.2f} times as long as on the other ranks",
                    _rank_remedy(cluster, rank),
                )


def _rank_remedy(cluster: ClusterEvidence, rank: RankSpeed) -> str:
    if cluster.device == "cpu":
        return f"look for other processes on {rank.host}, OMP_NUM_THREADS and CPU limits"
    return f"look at clocks, temperature, power limit and ECC errors of its GPU (nvidia-smi -q on {rank.host})"


def _slow_links(cluster: ClusterEvidence) -> Iterator[Sign]:
    slow = [(link, ratio, what) for link in cluster.links for ratio, what in _slowness(cluster, link)]
    shared = _shared_rank([link for link, _, _ in slow], len(cluster.ranks))
    if shared is not None:
        ratios = [ratio for _, ratio, _ in slow]
        yield Sign(
            f"all links of rank {shared} are slow: {statistics.median(ratios):.1f} times the time of others",
            "look at the network card and cable of its machine, and which interface it uses (NCCL_SOCKET_IFNAME, "
            "NCCL_IB_HCA)",
        )
        return
    for link, ratio, what in slow:
        a, b = link.ranks
        rate = formatting.size(cluster.link_bytes / link.exchange.median)
        yield Sign(
            f"the link between ranks {a} and {b} (machines {link.nodes[0]} and {link.nodes[1]}) takes {ratio:.1f} "
            f"times as long as others of its kind for {what}: {rate}/s",
            "look at cable, switch port and routing between them"
            if not link.is_inside
            else "look at the topology (nvidia-smi topo -m), and NCCL_P2P_LEVEL",
        )


def _slowness(cluster: ClusterEvidence, link: LinkSpeed) -> Iterator[tuple[float, str]]:
    """Yield how much slower a link is than others of its kind: within or between machines."""
    others = [one for one in cluster.links if one.is_inside == link.is_inside and one.ranks != link.ranks]
    ratio = _is_outlier(link.exchange, [one.exchange for one in others], _SLOW_LINK)
    if ratio is not None:
        yield ratio, "large messages"
        return
    ratio = _is_outlier(link.latency, [one.latency for one in others], _LATE_LINK)
    if ratio is not None:
        yield ratio, "small messages"


def _shared_rank(links: Sequence[LinkSpeed], num_ranks: int) -> int | None:
    """Return the rank whose links are all among these and that is in each of them; None if there is none."""
    if num_ranks < 3 or len({link.ranks for link in links}) != num_ranks - 1:
        return None
    shared = set.intersection(*(set(link.ranks) for link in links))
    return shared.pop() if len(shared) == 1 else None


def _skewed_clocks(cluster: ClusterEvidence) -> Iterator[Sign]:
    for clock in cluster.clocks:
        if clock.at_least_s > _MOST_SKEW_S:
            way = "ahead of" if clock.least_s > 0 else "behind"
            yield Sign(
                f"the clock of rank {clock.rank} is {clock.at_least_s:.1f} s {way} that of rank 0",
                "synchronise the machines' clocks (chrony, ntpd)",
            )


def _differing_settings(cluster: ClusterEvidence) -> Iterator[Sign]:
    for name, values in cluster.settings.items():
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        usual = max(counts, key=lambda value: counts[value])
        odd = [rank for rank, value in enumerate(values) if value != usual]
        yield Sign(
            f"{name} is {values[odd[0]]!r} on rank {odd[0]}"
            f"{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}, and {usual!r} on the others",
            "start all machines from one image and one script",
        )


CLUSTER_CHECKS: tuple[ClusterCheck, ...] = (
    ClusterCheck(
        name="slow_rank",
        severity="severe",
        find=_slow_ranks,
        why="every step takes as long as its slowest rank",
        source="arXiv 2407.21783, section 3.3.4; arXiv 2402.15627, section 5",
    ),
    ClusterCheck(
        name="slow_link",
        severity="severe",
        find=_slow_links,
        why="all-to-alls and all-reduces take as long as their slowest link",
        source="arXiv 2402.15627, section 5; areal-project/AReaL#639",
    ),
    ClusterCheck(
        name="skewed_clocks",
        severity="warning",
        find=_skewed_clocks,
        why="times in logs and status files mislead, and rendezvous may time out",
        source="awslabs/awsome-distributed-ai#180",
    ),
    ClusterCheck(
        name="differing_settings",
        severity="warning",
        find=_differing_settings,
        why="ranks disagree on kernels or on the network: a hang, or results that depend on the rank",
        source="NVIDIA/nccl#286; hiyouga/LlamaFactory#6111",
    ),
)
