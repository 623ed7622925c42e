"""Measure the cost of the step timer and the flight recorder.

torchrun --nproc-per-node 2 scripts/bench_watching.py configs/quickstart.yaml [a.b=c ...]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer.config.loader import load
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import build_corpus
from trainer.distributed import runtime
from trainer.distributed.mesh import joined
from trainer.distributed.rank_layout import layout_from_environment
from trainer.experiment import ExperimentConfig
from trainer.metrics.system_stats import SystemStats, reduce_over_ranks
from trainer.step_timer import Clock, HostClock, StepTimer
from trainer.training.model import build_parallel_model, numerics, resolve_kernel


class Counting:
    """Clock that counts its reads."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.looks = clock, 0

    def now(self) -> object:
        self.looks += 1
        return self._clock.now()

    def seconds(self, begin: object, end: object) -> float:
        return self._clock.seconds(begin, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=40, help="steps with and without, in turn (40)")
    options = parser.parse_args()
    config = load(options.config, options.overrides, ExperimentConfig)
    layout = layout_from_environment(config.parallel.degrees)
    device = runtime.start(config.parallel.device)
    config = resolve_kernel(config, device)
    with joined(layout, device, timeout_s=300) as mesh:
        corpus = build_corpus(config.data)
        stream = TrainStream(corpus, packing=config.data.packing, seq_len=config.model.seq_len, seed=config.seed)
        model = build_parallel_model(config, corpus.tokenizer, mesh, device, warn=print)
        engine = config.engine.build(model, config.optim, numerics(config), mesh)
        watch, machine = mesh.world.recorder.step_timer, SystemStats(Path(), device)
        clock = watch._clock = Counting(watch._clock)

        def step(number: int) -> None:
            batches = stream.micro_batches(
                number * config.train.global_batch_size,
                global_batch_size=config.train.global_batch_size,
                micro_batch_size=config.parallel.micro_batch_size,
                rank=layout.rank,
                world_size=layout.world_size,
            )
            engine.train_step(batches, lr=1e-3)

        def watched_step(number: int) -> None:
            watch.start()
            step(number)
            watch.stop()

        step(0)
        watched_step(0)
        looks, rounds, lines = clock.looks, [], []
        for number in range(1, options.rounds + 1):
            pair = [(function, _ms(function, number)) for function in (step, watched_step)[:: 1 - 2 * (number % 2)]]
            rounds.append([ms for _, ms in sorted(pair, key=lambda timed: timed[0] is watched_step)])
            lines.append(_ms(lambda _: reduce_over_ranks(watch.take(), machine.read(), mesh.world), number))
    if layout.rank > 0:
        return
    plain, watched = zip(*rounds, strict=True)
    for name, times in (("step", plain), ("watched step", watched), ("a line's exchange", lines)):
        print(f"{name:18} {statistics.median(times):8.3f} ms, {min(times):.3f} to {max(times):.3f}")
    mark_ms = _mark_ms()
    share = looks * mark_ms / statistics.median(plain)
    print(f"{looks} marks of {1e3 * mark_ms:.2f} us in a step: {100 * share:.4f} %")
    ratio = statistics.median(lines) / (config.metrics.log_every * statistics.median(plain))
    print(f"a line every {config.metrics.log_every} steps: {100 * ratio:.4f} %")


def _mark_ms() -> float:
    """Return the cost of one mark on the CPU, set and read."""
    watch, number = StepTimer(HostClock()), 100_000
    watch.start()
    began = time.perf_counter()
    for _ in range(number // 2):
        with watch.within("experts"):
            pass
    watch.stop()
    watch.take()
    return 1e3 * (time.perf_counter() - began) / number


def _ms(function: Callable[[int], object], number: int) -> float:
    began = time.perf_counter()
    function(number)
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
