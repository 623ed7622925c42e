"""Measure the cost of comparing replicated tensors relative to the steps of a config.

torchrun --nproc-per-node 2 scripts/bench_copies.py configs/quickstart.yaml [a.b=c ...]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.replica_check import check_copies
from trainer.config.loader import load
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import build_corpus
from trainer.distributed import runtime
from trainer.distributed.mesh import joined
from trainer.distributed.rank_layout import layout_from_environment
from trainer.experiment import ExperimentConfig
from trainer.training.model import build_parallel_model, numerics, resolve_kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20, help="steps, and comparisons, in turn (20)")
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

        def step(number: int) -> None:
            batches = stream.micro_batches(
                number * config.train.global_batch_size,
                global_batch_size=config.train.global_batch_size,
                micro_batch_size=config.parallel.micro_batch_size,
                rank=layout.rank,
                world_size=layout.world_size,
            )
            engine.train_step(batches, lr=1e-3)

        def compare(number: int) -> None:
            check_copies(engine.state(), mesh, step=number, equal_at=None)

        step(0)
        compare(0)
        rounds = [(_ms(step, number), _ms(compare, number)) for number in range(1, options.rounds + 1)]
    if layout.rank > 0:
        return
    step_ms, check_ms = (sorted(column) for column in zip(*rounds, strict=True))
    every = config.parallel.check_copies_every or 100
    for name, times in (("step", step_ms), ("comparison", check_ms)):
        print(f"{name:10} {statistics.median(times):8.2f} ms, {times[0]:.2f} to {times[-1]:.2f}")
    ratio = statistics.median(check_ms) / (every * statistics.median(step_ms))
    print(f"every {every} steps: {100 * ratio:.4f} % of the time of the steps; {len(engine.state().slices)} tensors")


def _ms(function: Callable[[int], None], number: int) -> float:
    """Both wait for the device and for the other ranks before they return."""
    began = time.perf_counter()
    function(number)
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
