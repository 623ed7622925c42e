"""Measure ranks, links and collectives in interleaved rounds. Collective, and within a budget of seconds."""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations

import torch

from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.distributed.version import turnout_version
from trainer.doctor.cluster.cluster_evidence import (
    ClockOffset,
    ClusterEvidence,
    LinkSpeed,
    RankSpeed,
)
from trainer.doctor.cluster.cluster_work import MOST_IN_A_ROW, Piece, Rank, Work, Workload
from trainer.doctor.cluster.measure_overheads import between_computations, overheads_of, tiny_steps, work_of_steps
from trainer.doctor.cluster.timed_rounds import COLLECTIVES, Rounds, curve_of, slowest

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 15
_CLOCK_ROUNDS = 9
_MOST_SERIAL, _MOST_PAIRED = 16, 64
"""Ranks up to which links are measured one after another; and up to which all of them are."""
_SETTINGS = ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS")
_PREFIXES = ("NCCL_", "TORCH_NCCL_")


def measure_cluster(mesh: Mesh, device: torch.device, workload: Workload | None = None) -> ClusterEvidence:
    """Measure the ranks of a mesh. Collective; what it returns is the same on every rank."""
    start, workload = time.perf_counter(), workload or Workload.of(device)
    world, per_node = mesh.world, max(1, mesh.layout.ranks_per_node)
    rank = Rank(workload, world, device)
    hosts = mesh.host.all_gather_objects(socket.gethostname())
    burst = workload.burst_s
    rank.num_products, rank.num_copies = (
        _repeats(work, burst, mesh.host, device) for work in (rank.multiply, rank.copy)
    )
    rank.num_small = _repeats(rank.compute, workload.computed_s, mesh.host, device)
    for kind, num_bytes in between_computations(rank):
        number = _repeats(partial(getattr(rank, kind), num_bytes), workload.in_a_row_s, mesh.host, device)
        rank.in_a_row[kind, num_bytes] = min(number, MOST_IN_A_ROW)
    tiny = tiny_steps(mesh, device, workload.tiny_layers)
    times = timed(_work(rank, world.size, per_node), workload.budget_s, mesh, device)
    times |= timed(work_of_steps(rank, tiny), workload.overheads_s, mesh, device)
    for step in tiny.values():
        step.close()
    pairs = sorted((int(name[1]), int(name[2])) for name in times if name[0] == "link")
    return ClusterEvidence(
        ranks=[
            RankSpeed(
                rank=number,
                host=hosts[number],
                node=number // per_node,
                matmul=Rounds(seconds=times["matmul",][number]),
                copy=Rounds(seconds=times["copy",][number]),
            )
            for number in range(world.size)
        ],
        links=[
            LinkSpeed(
                ranks=pair,
                nodes=(pair[0] // per_node, pair[1] // per_node),
                exchange=_of_pair(times["link", str(pair[0]), str(pair[1])], pair),
                latency=_of_pair(times["latency", str(pair[0]), str(pair[1])], pair),
            )
            for pair in pairs
        ],
        collectives={kind: curve_of(times, kind) for kind in COLLECTIVES},
        overheads=overheads_of(times, tiny, rank),
        clocks=_clock_offsets(mesh.host),
        matmul_flops=2.0 * workload.width**3 * rank.num_products,
        copy_bytes=2.0 * workload.copied * rank.num_copies,
        link_bytes=workload.link,
        device=device.type,
        dtype=str(workload.dtype).removeprefix("torch."),
        settings=_settings(mesh.host),
        seconds=time.perf_counter() - start,
    )


def _of_pair(times: Sequence[Sequence[float]], pair: tuple[int, int]) -> Rounds:
    """Return the times of the slower of both ranks."""
    return slowest([times[rank] for rank in pair])


def _work(rank: Rank, size: int, per_node: int) -> Iterator[Piece]:
    """Yield everything that is measured, with what it is a time of."""
    me = rank.world.index
    yield [("matmul",)], rank.multiply
    yield [("copy",)], rank.copy
    if size == 1:
        return
    for num_bytes in rank.workload.sizes:
        for kind in COLLECTIVES:
            yield [(kind, str(num_bytes))], partial(getattr(rank, kind), num_bytes)
    for pairs in pairings(size, per_node):
        partner = next((b if a == me else a for a, b in pairs if me in (a, b)), None)
        for kind, num_bytes in (("link", rank.workload.link), ("latency", 4)):
            names: list[Work] = [(kind, str(a), str(b)) for a, b in pairs]
            yield names, partial(rank.exchange, partner, num_bytes)


def pairings(size: int, per_node: int) -> Iterator[list[tuple[int, int]]]:
    """Yield disjoint pairs of ranks to be measured at the same time, each pair once.

    Few ranks: one pair at a time. Many: all pairs in rounds. Very many: those within machines, in all machines at once,
    and the first ranks of each pair of machines.
    """
    if size <= _MOST_SERIAL:
        yield from ([pair] for pair in combinations(range(size), 2))
    elif size <= _MOST_PAIRED or per_node < 2:
        yield from _tournament(range(size))
    else:
        nodes = range(0, size, per_node)
        for local in _tournament(range(per_node)):
            yield [(first + a, first + b) for first in nodes for a, b in local if first + b < size]
        yield from _tournament(nodes)


def _tournament(players: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds in which each player meets at most one other (circle method)."""
    circle: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    for _ in range(len(circle) - 1):
        pairs = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def timed(pieces: Iterable[Piece], budget_s: float, mesh: Mesh, device: torch.device) -> dict[Work, list[list[float]]]:
    """Return the seconds of every rank and round, by name; all ranks begin each piece of work together."""
    if not (work := list(pieces)):
        return {}
    warm_up = mesh.host.all_gather_objects([_seconds(function, mesh.host, device) for _, function in work])
    share = budget_s / len(work)
    rounds = [
        max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(share / max(of_ranks)))) for of_ranks in zip(*warm_up, strict=True)
    ]
    mine: dict[Work, list[float]] = defaultdict(list)
    for number in range(_MOST_ROUNDS):
        for count, (names, function) in zip(rounds, work, strict=True):
            if number * count // _MOST_ROUNDS == (number + 1) * count // _MOST_ROUNDS:
                continue  # rounds of what takes long are spread over all
            seconds = _seconds(function, mesh.host, device)
            for name in names:
                mine[name].append(seconds)
    everyone = mesh.host.all_gather_objects([[list(name), seconds] for name, seconds in mine.items()])
    return {tuple(name): [of_rank[index][1] for of_rank in everyone] for index, (name, _) in enumerate(everyone[0])}


def _repeats(function: Callable[[], None], seconds: float, host: Group, device: torch.device) -> int:
    """Return how often a rank that nothing disturbs can do something in a time, the same on all ranks."""
    times = host.all_gather_objects(min(_seconds(function, host, device) for _ in range(_LEAST_ROUNDS)))
    return max(1, int(seconds / min(times)))


def _seconds(function: Callable[[], None], host: Group, device: torch.device) -> float:
    _meet(host)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _meet(group: Group) -> None:
    """Wait for all ranks of a group."""
    group.all_reduce_(torch.zeros(1))


def _clock_offsets(host: Group) -> list[ClockOffset]:
    """Return bounds of each rank's clock ahead of rank 0's.

    Rank 0 reads its clock after all have met, so after any rank came there, and before any has what was read: between
    two readings of that rank's own clock.
    """
    if host.size == 1:
        return []
    least, most = float("-inf"), float("inf")
    for _ in range(_CLOCK_ROUNDS):
        before = time.time()
        _meet(host)
        read = torch.tensor([time.time()], dtype=torch.float64)
        theirs = float(host.all_gather(read)[0])
        after = time.time()
        least, most = max(least, before - theirs), min(most, after - theirs)
    bounds = host.all_gather_objects([least, most])
    return [
        ClockOffset(rank=number, least_s=min(pair), most_s=max(pair)) for number, pair in enumerate(bounds) if number
    ]


def _settings(host: Group) -> dict[str, list[str | None]]:
    """Return versions and variables that differ between ranks."""
    names = [name for name in sorted(os.environ) if name in _SETTINGS or name.startswith(_PREFIXES)]
    mine: dict[str, str | None] = {name: os.environ[name] for name in names}
    mine |= {"torch": str(torch.__version__), "turnout": turnout_version(), "cores": str(len(os.sched_getaffinity(0)))}
    everyone = host.all_gather_objects(mine)
    every = dict.fromkeys(name for one in everyone for name in one)
    found = {name: [one.get(name) for one in everyone] for name in every}
    return {name: values for name, values in found.items() if len(set(values)) > 1}
