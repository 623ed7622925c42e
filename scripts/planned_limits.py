"""Train every layout that plans of a config list, on gloo ranks with no more memory than was planned for.

    python -m scripts.planned_limits configs/quickstart.yaml train.global_batch_size=8

Each plan is made twice: for more memory than any layout needs, and for the median of what those need. The ready config
of each layout that fits trains for three steps, with evaluation and saving, where tensors of more bytes than the plan's
memory raise an error; a layout that was refused must raise it. Its ratio is that of both peaks. `--by-number` routes
round-robin, so that the assumed load is the real one and nothing is refused that would have fitted.
"""

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from scripts.planned_memory import ROUND_ROBIN, be_quiet, mesh_of
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.signals import StopRequest
from trainer.experiment import ExperimentConfig
from trainer.plan.fake_step import num_ids_of
from trainer.plan.find_layouts import Plan
from trainer.plan.gpus import gpu_named
from trainer.plan.layout_estimates import least_state_bytes
from trainer.plan.layouts import Choices, Cluster, PlannedLayout, layouts_of
from trainer.plan.plan_config import PlanRequest, found_layouts, planned_file
from trainer.plan.tensor_bytes import OverLimit, TensorBytes
from trainer.prove.pool import Failure, LocalRanks
from trainer.status import StatusFile
from trainer.training.loop import fit
from trainer.training.setup import build_run

_SHORT = ["train.steps=3", "schedule.warmup_steps=0", "eval.max_tokens_per_domain=512", "checkpoint.every=3"]
_PATIENCE_S = 300.0
_PATIENCE_WITH_REFUSED_S = 20.0
"""For ranks that wait for one which has failed."""
_MOST_WITHOUT_ROOM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A layout to train."""

    layout: PlannedLayout
    is_planned: bool
    peak: int
    """Planned, or the least that its weights, gradients and moments need."""
    why: str = ""


def trials_of(request: PlanRequest, plan: Plan) -> Iterator[Trial]:
    """Yield what a plan lists, and some layouts that have no room."""
    for one in plan.fitting:
        yield Trial(layout=one.layout, is_planned=True, peak=one.cost.peak)
    for one in plan.too_big:
        yield Trial(layout=one.layout, is_planned=False, peak=one.cost.peak)
    config, cluster = request.config, request.cluster
    num_ids, found = num_ids_of(config), 0
    for layout in layouts_of(config, cluster, request.choices):
        least = least_state_bytes(config, layout, cluster.world_size, num_ids)
        if least > cluster.usable and found < _MOST_WITHOUT_ROOM and layout.applied(config) is not None:
            found += 1
            yield Trial(layout=layout, is_planned=False, peak=least, why=" (no room)")


def train_within(path: Path, folder: Path, limit: int, trial: int) -> int | None:
    """Train a config as this rank; return its peak, or None if it needs more than the limit."""
    be_quiet()
    places = [f"runs_dir={folder}/runs", f"data.cache_dir={folder}/cache", f"name=trial_{trial}"]
    config = load(path, [*places, *_SHORT], ExperimentConfig)
    world = dist.get_world_size()
    mesh = mesh_of(world, world, config.parallel.degrees, FlightRecorder())
    where = RunFolder(Path(config.runs_dir) / config.name)
    console = Console(config.train.steps, file=io.StringIO())
    with StopRequest() as stop, closing(console), TensorBytes(limit) as counts:
        run = build_run(config, where, console, mesh, torch.device("cpu"))
        fit(run, stop, StatusFile(where.status, rank=mesh.layout.rank))
        run.saver.close()
        run.engine.close()
    return counts.peak


def result_of(answers: Sequence[object]) -> int | None:
    """Return the peak of the ranks' training; None if one of them needed more than the limit."""
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    if any(OverLimit.__name__ in failure.text for failure in failures):
        return None
    if failures:
        sys.exit(next((failure.text for failure in failures if failure.text), "a rank died"))
    return max(answer for answer in answers if isinstance(answer, int))


def main() -> None:
    """Print a line for each layout, and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--by-number", action="store_true")
    options = parser.parse_args()
    be_quiet()
    overrides = [*options.overrides, *([ROUND_ROBIN] if options.by_number else [])]
    config, imbalance = load(options.config, overrides, ExperimentConfig), 1.0 if options.by_number else 1.25
    pool, counts = LocalRanks(), {True: [0, 0], False: [0, 0]}
    with tempfile.TemporaryDirectory() as name:
        folder, number = Path(name), 0
        for world_size in options.worlds:
            cluster = Cluster(world_size, world_size, gpu_named("cpu"), 1 << 40)
            most = PlanRequest(
                config=config, cluster=cluster, choices=Choices(), imbalance=imbalance, wanted=99, seconds=1e6
            )
            roomy = found_layouts(most)
            half = int(1.001 * statistics.median(one.cost.peak for one in roomy.fitting))
            less = replace(most, cluster=cluster._replace(usable=half))
            for request, plan in ((most, roomy), (less, found_layouts(less))):
                limit = request.cluster.usable
                for trial in trials_of(request, plan):
                    number += 1
                    path = folder / f"planned_{number}.yaml"
                    path.write_text(planned_file(request, trial.layout, path))
                    patience = _PATIENCE_S if trial.is_planned else _PATIENCE_WITH_REFUSED_S
                    answers = pool.run(world_size, train_within, path, folder, limit, number, timeout_s=patience)
                    peak = result_of(answers)
                    counts[trial.is_planned][peak is not None] += 1
                    print(_line(world_size, limit, trial, peak), flush=True)
    pool.close()
    print(f"planned: {counts[True][1]} trained, {counts[True][0]} did not")
    print(f"refused: {counts[False][0]} failed for memory, {counts[False][1]} trained")


def _line(world_size: int, limit: int, trial: Trial, peak: int | None) -> str:
    layout = trial.layout
    shared = f"{layout.ep_size} {layout.groups:<9} {layout.sharding:<21}"
    name = f"{world_size} {shared} {layout.recompute:<21} {layout.micro_batch_size:>3}"
    asked = f"{'planned' if trial.is_planned else 'refused'}{trial.why}"
    memory = "any" if limit >= 1 << 40 else f"{limit / 1e6:.2f} MB"
    found = "over the limit" if peak is None else f"trained, peak {peak / trial.peak:.4f} of it"
    return f"{name} memory {memory:>9}: {asked} at {trial.peak / 1e6:8.2f} MB, {found}"


if __name__ == "__main__":
    main()
