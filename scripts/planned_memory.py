"""Compare what plans of a config count with real steps on gloo ranks, for every layout of 1, 2 and 4 ranks.

    python -m scripts.planned_memory configs/quickstart.yaml train.global_batch_size=8 --json /tmp/memory.json

Of several ranks each way to share experts and weights gets one kind of recomputation, in turn, unless `--all`. A row of
the table is a layout:

    planned    peak of the plan, for `--micro-batches` on each rank (2)
    tensors    peak of a real step over the plan's, by a dispatch mode that sees every tensor, with round-robin routing
    allocated  peak of a real step over the plan's, by the events of torch's allocator, with the config's own router,
               whose load in that step the plan is given if experts are split; the rank that needs most
    sent       whether calls, bytes and messages of every collective are equal, with round-robin routing
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer.config.loader import load
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Degrees, Layout
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.saved_bytes import peak_bytes
from trainer.plan.fake_step import num_ids_of, runnable
from trainer.plan.gpus import gpu_named
from trainer.plan.layouts import Choices, Cluster, PlannedLayout, layouts_of
from trainer.plan.measure_layout import measure_layout
from trainer.plan.measured_rank import Ranks
from trainer.plan.step_cost import Quantity, StepCost, cost_of
from trainer.plan.step_probe import ProbeOptions, WindowRecorder, probe_step, random_batches
from trainer.prove.pool import Failure, LocalRanks
from trainer.training.model import build_parallel_model, numerics

_CPU = torch.device("cpu")
_AT_ONCE = 8
"""Layouts of one start of the ranks."""
ROUND_ROBIN = "model.moe.router={kind: round_robin, top_k: 2}"


class Case(NamedTuple):
    """A layout of some ranks."""

    world_size: int
    per_node: int
    layout: PlannedLayout

    @property
    def name(self) -> str:
        """Name in a table."""
        layout = self.layout
        hops = ", 2 hops" if layout.hierarchical else ""
        shared = f"{layout.groups:<6} {layout.sharding + hops:<21}"
        return f"{self.world_size} {layout.ep_size} {shared} {layout.recompute:<21}"


class Measured(NamedTuple):
    """What a rank's real steps need."""

    by_number: StepCost
    """Of round-robin routing."""
    allocated: int
    """Peak of the config's own routing."""
    counts: list[int]
    """(E,) assignments of the experts in that step, over all ranks and layers."""


def cases_of(config: ExperimentConfig, world_size: int, micro_batches: int) -> Iterator[Case]:
    """Yield every layout of `--micro-batches`; those of four ranks on two machines of two, too."""
    for per_node in sorted({world_size, max(1, world_size // 2)} if world_size > 2 else {world_size}):
        cluster = Cluster(world_size, per_node, gpu_named("cpu"), 1 << 62)
        rows = config.train.global_batch_size // world_size
        choices = Choices(micro_batch_sizes=[-(-rows // micro_batches)])
        for layout in layouts_of(config, cluster, choices):
            if per_node == world_size or layout.shard_size is not None or layout.hierarchical:
                stages = (0, 1) if layout.engine == "deepspeed" and layout.zero_stage == 1 else (layout.zero_stage,)
                cases = [Case(world_size, per_node, replace(layout, zero_stage=stage)) for stage in stages]
                yield from (case for case in cases if case.layout.applied(config) is not None)


def real_steps(path: str, overrides: Sequence[str], cases: Sequence[Case]) -> list[Measured]:
    """Return what this rank's steps need."""
    be_quiet()
    own, by_number = (load(path, [*overrides, *more], ExperimentConfig) for more in ([], [ROUND_ROBIN]))
    return [_real_step(own, by_number, case) for case in cases]


def _real_step(own: ExperimentConfig, by_number: ExperimentConfig, case: Case) -> Measured:
    counted, config = (config_of_layout(each, case.layout) for each in (by_number, own))
    place = case.world_size, case.per_node, config.parallel.degrees
    step = probe_step(counted, mesh_of(*place, WindowRecorder()), _CPU, ProbeOptions(num_ids=num_ids_of(own), seed=1))
    mesh = mesh_of(*place, FlightRecorder())
    model = build_parallel_model(config, ByteTokenizer(), mesh, _CPU, warn=print)
    engine = config.engine.build(model, config.optim, numerics(config), mesh)
    engine.held()
    batches = random_batches(config, mesh, ProbeOptions(num_ids=num_ids_of(own), seed=1))
    engine.train_step(batches[:1] if mesh.pp.size == 1 else batches, lr=1e-4)
    gc.collect()
    counts: list[Any] = []

    def run() -> None:
        result = engine.train_step(batches, lr=1e-4)
        counts.append(None if result.routing is None else result.routing.counts.sum(0).tolist())

    allocated = step.resident + peak_bytes(run, _CPU)
    engine.close()
    return Measured(cost_of(step), allocated, counts[0] or [])


def config_of_layout(config: ExperimentConfig, layout: PlannedLayout) -> ExperimentConfig:
    """Return a config under a layout that it can have, with a kernel of CPUs."""
    applied = layout.applied(config)
    assert applied is not None, "other layouts are not listed"
    return runnable(applied, "cpu")


def mesh_of(world_size: int, per_node: int, degrees: Degrees, recorder: FlightRecorder) -> Mesh:
    """Return the mesh of this rank."""
    layout = Layout(world_size=world_size, rank=dist.get_rank(), ranks_per_node=per_node, **asdict(degrees))
    return build_mesh(layout, recorder)


class Row(NamedTuple):
    """A layout, planned and measured."""

    name: str
    planned: int
    tensors: float
    allocated: float
    is_sent_equal: bool

    def __str__(self) -> str:
        sent = "equal" if self.is_sent_equal else "DIFFERENT"
        return f"{self.name} {self.planned / 1e6:8.2f} MB {self.tensors:8.4f} {self.allocated:9.4f}  {sent}"


def row_of(own: ExperimentConfig, by_number: ExperimentConfig, case: Case, real: Sequence[Measured]) -> Row:
    """Return a layout's row from what its ranks measured."""
    ranks = Ranks(world_size=case.world_size, per_node=case.per_node, device="cpu")
    has_stages = case.layout.pp_size > 1
    even = measure_layout(config_of_layout(by_number, case.layout), ranks, whole=has_stages)
    is_split, shares = case.layout.ep_size > 1, real[0].counts
    loaded = even
    if is_split:
        loaded = measure_layout(config_of_layout(own, case.layout), replace(ranks, shares=shares), whole=has_stages)
    return Row(
        name=case.name,
        planned=even.peak,
        tensors=max(one.by_number.peak for one in real) / even.peak,
        allocated=max(one.allocated for one in real) / loaded.peak,
        is_sent_equal=any(_sent(even) == _sent(one.by_number) for one in (real if has_stages else real[:1])),
    )


def _sent(cost: StepCost) -> dict[Quantity, int]:
    sent = ("calls", "bytes", "messages")
    return {key: round(value) for key, value in cost.totals.items() if key.unit in sent and round(value)}


def be_quiet() -> None:
    """Leave out what torch and DeepSpeed say."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def main() -> None:
    """Print a row for every layout, and the extremes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--micro-batches", type=int, default=2, help="of each rank")
    parser.add_argument("--like", default="", help="only layouts whose name contains this")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    be_quiet()
    own, by_number = (
        load(options.config, [*options.overrides, *more], ExperimentConfig) for more in ([], [ROUND_ROBIN])
    )
    pool, rows = LocalRanks(), []
    for world_size in options.worlds:
        cases = [case for case in cases_of(own, world_size, options.micro_batches) if options.like in case.name]
        if world_size > 1 and not options.all:
            cases = [case for number, case in enumerate(cases) if number % 4 == number // 4 % 4]
        # Torch names groups by how many a rank has had, and of a pipeline only the first and last stage share one.
        at_once = 1 if any(case.layout.pp_size > 1 for case in cases) else _AT_ONCE
        for start in range(0, len(cases), at_once):
            some = cases[start : start + at_once]
            answers = pool.run(world_size, real_steps, options.config, options.overrides, some, timeout_s=600)
            for answer in answers:
                if isinstance(answer, Failure):
                    sys.exit(answer.text or "a rank died")
            for number, case in enumerate(some):
                rows.append(row_of(own, by_number, case, [answer[number] for answer in answers]))
                print(rows[-1], flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    pool.close()
    if not rows:
        sys.exit(f"no layout that was looked at has a name with {options.like!r} in it; --all looks at all of them")
    for what in ("tensors", "allocated"):
        ratios = [getattr(row, what) for row in rows]
        print(f"{what}: {min(ratios):.4f} to {max(ratios):.4f}, median {statistics.median(ratios):.4f}")
    print(f"sent: equal in {sum(row.is_sent_equal for row in rows)} of {len(rows)} layouts")


if __name__ == "__main__":
    main()
