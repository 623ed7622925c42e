"""Compare the time model of plans with real steps on gloo ranks of this machine, in interleaved rounds.

    python -m torch.distributed.run --nproc-per-node 2 -m trainer doctor --cluster --links /tmp/links.json
    python -m scripts.planned_times configs/quickstart.yaml --links /tmp/links.json

A row is a layout: the model's time, the median of measured steps and their extremes, the ratio of the first two, the
share of a step in which a rank worked (the rest it waited, for other ranks or for a processor), both places in the
order, and the parts of the model's time. Keep the machine idle.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from scripts.planned_memory import be_quiet, config_of_layout, mesh_of
from trainer.config.loader import load
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed import runtime
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.experiment import ExperimentConfig
from trainer.plan.fake_step import num_ids_of
from trainer.plan.gpus import gpu_named
from trainer.plan.layouts import PlannedLayout
from trainer.plan.links import read_links
from trainer.plan.measure_layout import measure_layout
from trainer.plan.measured_rank import Ranks
from trainer.plan.step_probe import ProbeOptions, random_batches
from trainer.plan.step_time import step_time
from trainer.prove.pool import Failure, LocalRanks
from trainer.training.model import build_parallel_model, numerics

_OF_ONE = [
    PlannedLayout(micro_batch_size=size, recompute=recompute) for size in (16, 4, 1) for recompute in ("none", "block")
] + [
    PlannedLayout(micro_batch_size=16, recompute="experts"),
    PlannedLayout(micro_batch_size=16, engine="deepspeed", zero_stage=1),
]
_OF_SEVERAL = [
    PlannedLayout(micro_batch_size=16),
    PlannedLayout(micro_batch_size=4),
    PlannedLayout(micro_batch_size=16, recompute="block"),
    PlannedLayout(micro_batch_size=16, ep_size=2),
    PlannedLayout(micro_batch_size=4, ep_size=2),
    PlannedLayout(micro_batch_size=4, ep_size=2, recompute="experts"),
    PlannedLayout(micro_batch_size=8, data="shard", shard_keeps="weights"),
    PlannedLayout(micro_batch_size=4, data="shard", shard_keeps="nothing"),
    PlannedLayout(micro_batch_size=8, ep_size=2, data="shard", shard_keeps="gradients"),
    PlannedLayout(micro_batch_size=16, engine="deepspeed", zero_stage=1),
]


class Timed(NamedTuple):
    """Steps of a rank."""

    seconds: list[float]
    worked: list[float]
    """Seconds of its processor."""


def timed_steps(path: str, overrides: Sequence[str], layouts: Sequence[PlannedLayout], rounds: int) -> list[Timed]:
    """Return the times of this rank's steps by layout: one of each in every round."""
    be_quiet()
    device, world = runtime.start("cpu"), dist.get_world_size()
    own, steps = load(path, overrides, ExperimentConfig), []
    for layout in layouts:
        config = config_of_layout(own, layout)
        mesh = mesh_of(world, world, config.parallel.degrees, FlightRecorder())
        model = build_parallel_model(config, ByteTokenizer(), mesh, device, warn=print)
        engine = config.engine.build(model, config.optim, numerics(config), mesh)
        options = ProbeOptions(num_ids=num_ids_of(own), seed=dist.get_rank())
        steps.append((engine, random_batches(config, mesh, options)))
    times = [Timed([], []) for _ in layouts]
    for number in range(rounds + 1):
        for (engine, batches), timed in zip(steps, times, strict=True):
            dist.barrier()
            start, worked = time.perf_counter(), time.process_time()
            engine.train_step(batches, lr=1e-4)
            if number > 0:  # the first step prepares something
                timed.seconds.append(time.perf_counter() - start)
                timed.worked.append(time.process_time() - worked)
    for engine, _ in steps:
        engine.close()
    return times


def _slowest(of_ranks: Sequence[Timed]) -> Timed:
    """Return the times of the slowest rank of each round."""
    return Timed(*([max(one) for one in zip(*each, strict=True)] for each in zip(*of_ranks, strict=True)))


def _places(times: Sequence[float]) -> list[int]:
    return [sorted(times).index(one) + 1 for one in times]


def main() -> None:
    """Print a row for every layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--links", type=Path, required=True)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times", type=Path, help="keep the measured times here; with --read: use those")
    parser.add_argument("--read", action="store_true", help="measure nothing")
    options = parser.parse_args()
    be_quiet()
    world = options.world_size
    layouts = _OF_SEVERAL if world > 1 else _OF_ONE
    if options.read:
        measured = json.loads(options.times.read_text())
    else:
        pool = LocalRanks()
        answers = pool.run(
            world, timed_steps, options.config, options.overrides, layouts, options.rounds, timeout_s=300
        )
        pool.close()
        for answer in answers:
            if isinstance(answer, Failure):
                sys.exit(answer.text or "a rank died")
        measured = [_slowest(of_ranks) for of_ranks in zip(*answers, strict=True)]
        if options.times is not None:
            options.times.write_text(json.dumps(measured))
    own, links = load(options.config, options.overrides, ExperimentConfig), read_links(options.links)
    gpu, ranks = links.of(gpu_named("cpu")), Ranks(world_size=world, per_node=world, device="cpu")
    costs = (measure_layout(config_of_layout(own, layout), ranks) for layout in layouts)
    modelled = [step_time(cost, gpu, ranks_per_node=world, links=links) for cost in costs]
    medians = [statistics.median(seconds) for seconds, _ in measured]
    places = zip(_places([model.total for model in modelled]), _places(medians), strict=True)
    for layout, model, found, (seconds, worked), both in zip(layouts, modelled, medians, measured, places, strict=True):
        name = f"{layout.ep_size} {layout.sharding:<21} {layout.recompute:<8} {layout.micro_batch_size:>3}"
        spread = f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
        busy = statistics.median(worked) / found
        parts = ", ".join(f"{key} {value * 1e3:.0f}" for key, value in asdict(model).items() if value)
        print(
            f"{name} {model.total * 1e3:6.0f} ms {found * 1e3:6.0f} ms ({spread:>12}) {model.total / found:5.2f} "
            f"{busy:4.0%} {both[0]:>3} {both[1]:>3}  {parts}"
        )


if __name__ == "__main__":
    main()
