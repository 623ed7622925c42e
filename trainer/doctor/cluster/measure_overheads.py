"""Measure what a step takes beyond its products: collectives between computations, and steps of tiny models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from trainer.distributed.mesh import Mesh
from trainer.doctor.cluster.cluster_work import MOST_IN_A_ROW, Piece, Rank
from trainer.doctor.cluster.step_overheads import StepOverheads, TinySpeed
from trainer.doctor.cluster.timed_rounds import COLLECTIVES, CollectiveSpeed, Rounds, Times, curve_of, slowest
from trainer.doctor.cluster.tiny_steps import TinyStep

TinySteps = Mapping[tuple[int, bool], TinyStep]
"""By the number of layers, and by whether weights are sharded."""


def tiny_steps(mesh: Mesh, device: torch.device, layers_of: Sequence[int]) -> TinySteps:
    """Build the tiny models; sharded ones if there is more than one rank. Collective."""
    kinds = [(layers, sharded) for sharded in (False, True)[: mesh.world.size] for layers in layers_of]
    return {(layers, sharded): TinyStep(layers, mesh, device, sharded=sharded) for layers, sharded in kinds}


def between_computations(rank: Rank) -> list[tuple[str, int]]:
    """Return the collectives that are measured between computations, and their bytes: all but the largest."""
    workload = rank.workload
    if rank.world.size == 1 or not workload.tiny_layers:
        return []
    return [(kind, num_bytes) for num_bytes in sorted(workload.sizes)[:-1] for kind in COLLECTIVES]


def work_of_steps(rank: Rank, tiny: TinySteps) -> Iterator[Piece]:
    """Yield what is measured, with its name."""
    if not tiny:
        return
    for (layers, sharded), step in tiny.items():
        yield [("tiny", str(layers), str(sharded))], step.run
    if rank.world.size == 1:
        return
    yield [("compute",)], partial(rank.alternate, None)
    for kind, num_bytes in between_computations(rank):
        yield [("beside", kind, str(num_bytes))], partial(rank.alternate, kind, num_bytes)


def overheads_of(times: Times, tiny: TinySteps, rank: Rank) -> StepOverheads | None:
    """Return what was measured."""
    if not tiny:
        return None
    whole = _of_tiny(times, tiny, sharded=False)
    if ("compute",) not in times:
        return StepOverheads(whole=whole)
    beside = {kind: _beside(times, kind, rank) for kind in COLLECTIVES}
    return StepOverheads(whole=whole, sharded=_of_tiny(times, tiny, sharded=True), beside=beside)


def _of_tiny(times: Times, tiny: TinySteps, *, sharded: bool) -> tuple[TinySpeed, TinySpeed]:
    shallow, deep = (
        TinySpeed(
            operations=tiny[layers, sharded].num_operations,
            gathers=tiny[layers, sharded].num_collectives("allgather_base"),
            reductions=tiny[layers, sharded].num_collectives("reduce_scatter_base"),
            rounds=slowest(times["tiny", str(layers), str(sharded)]),
        )
        for layers, is_sharded in sorted(tiny)
        if is_sharded == sharded
    )
    return shallow, deep


def _beside(times: Times, kind: str, rank: Rank) -> list[CollectiveSpeed]:
    """Return a collective's times beyond the computation around it, and no less than by itself.

    The largest one has what the one before it takes in addition.
    """
    computed = slowest(times["compute",]).median / MOST_IN_A_ROW
    curve: list[CollectiveSpeed] = []
    more = 0.0
    for idle in curve_of(times, kind):
        alone, work = idle.rounds.median, ("beside", kind, str(idle.num_bytes))
        seconds = [alone + more]
        if work in times:
            number = rank.in_a_row[kind, idle.num_bytes]
            seconds = [max(one / number - computed, alone) for one in slowest(times[work]).seconds]
        curve.append(replace(idle, rounds=Rounds(seconds=seconds)))
        more = curve[-1].rounds.median - alone
    return curve
