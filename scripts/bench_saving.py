"""Measure the cost of saving: alternating blocks of steps, with and without a save at their start, in one run.

    OMP_NUM_THREADS=2 python scripts/bench_saving.py configs/quickstart.yaml --rounds 6

Prints the time of a block with a save over that of the block without one beside it. A block is as long as the interval
between saves that is asked about.
"""

import argparse
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.saver import Saved
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.training.run import RunState
from trainer.training.setup import build_run


def block(run: RunState, num_steps: int, *, saves: bool) -> tuple[float, Saved | None]:
    """Take steps, after starting a save if asked; return the total seconds and the outcome of the save."""
    began, saved = time.perf_counter(), None
    if saves:
        run.saver.start(run.start_step, run.engine.state(), run.checkpoint_info())
        if not run.config.checkpoint.asynchronous:
            saved = run.saver.wait()
    for _ in range(num_steps):
        batches = run.stream.micro_batches(
            run.position,
            global_batch_size=run.config.train.global_batch_size,
            micro_batch_size=run.config.parallel.micro_batch_size,
        )
        run.engine.train_step(batches, lr=1e-3)
        run.position += run.config.train.global_batch_size
        run.start_step += 1
        saved = run.saver.finished() or saved
    return time.perf_counter() - began, saved or run.saver.wait()


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--every", type=int, default=50, help="steps of a block (50)")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    config = load(options.config, options.overrides, ExperimentConfig)
    device = runtime.start(config.parallel.device)
    with tempfile.TemporaryDirectory(dir=".") as folder, closing(Console()) as console:  # a disk, not memory
        run = build_run(config, RunFolder(Path(folder) / "run"), console, Mesh.of_one(), device)
        block(run, 5, saves=True)
        ratios, waited_ms = [], []
        for number in range(options.rounds):
            seconds = {}
            for saves in (True, False) if number % 2 else (False, True):
                seconds[saves], saved = block(run, options.every, saves=saves)
                if saved is not None:
                    waited_ms.append(saved.stalled_s * 1e3)
            ratios.append(seconds[True] / seconds[False])
            print(f"round {number + 1}: {seconds[False]:.1f} s without, {ratios[-1]:.3f} of it with a save", flush=True)
        print(f"median {median(ratios):.3f}; the loop itself waited {median(waited_ms):.0f} ms for a save (median)")


if __name__ == "__main__":
    main()
