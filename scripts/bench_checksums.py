"""Measure the cost of verifying the token cache's checksums: hashing alone, and during training.

python scripts/bench_checksums.py configs/quickstart.yaml [a.b=c ...]
"""

import argparse
import hashlib
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

from trainer.config.loader import load
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import build_corpus
from trainer.data.token_cache.checksums import BLOCK_BYTES, CheckedArray
from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.training.model import build_parallel_model, numerics, resolve_kernel

_HASHED_BYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of trainings, with and without comparing (10)")
    parser.add_argument("--steps", type=int, default=20, help="of each training (20)")
    options = parser.parse_args()
    config = load(options.config, options.overrides, ExperimentConfig)
    device = runtime.start(config.parallel.device)
    config = resolve_kernel(config, device)

    block = bytes(BLOCK_BYTES)
    began = time.process_time()
    for _ in range(_HASHED_BYTES // BLOCK_BYTES):
        hashlib.sha256(block).digest()
    print(
        f"SHA-256 of blocks of {BLOCK_BYTES >> 10} KiB: {_HASHED_BYTES / (time.process_time() - began) / 1e9:.2f} GB/s"
    )

    corpus = build_corpus(config.data)
    model = build_parallel_model(config, corpus.tokenizer, Mesh.of_one(), device, warn=print)
    engine = config.engine.build(model, config.optim, numerics(config), Mesh.of_one())

    def start() -> tuple[float, TrainStream]:
        """Open the cache anew, of which nothing was compared."""
        began = time.process_time()
        opened = build_corpus(config.data)
        seconds = time.process_time() - began
        return seconds, TrainStream(opened, packing=config.data.packing, seq_len=config.model.seq_len, seed=config.seed)

    def train() -> tuple[float, float]:
        """Return the seconds of a training from its first step on, and of them those for rows."""
        _, stream = start()
        rows_s = 0.0
        began = time.process_time()
        for step in range(options.steps):
            before = time.process_time()
            batches = stream.micro_batches(
                step * config.train.global_batch_size,
                global_batch_size=config.train.global_batch_size,
                micro_batch_size=config.parallel.micro_batch_size,
            )
            rows_s += time.process_time() - before
            engine.train_step(batches, lr=1e-3)
        return time.process_time() - began, rows_s

    train()
    ratios, costs = [], []
    for _ in range(options.rounds):
        compared = train()
        with mock.patch.object(CheckedArray, "_check", lambda array, blocks: None):
            free = train()
        ratios.append(compared[0] / free[0])
        costs.append(compared[1] - free[1])
    size_mb = sum(file.tokens[:].nbytes for file in corpus.train) / 1e6
    print(
        f"{options.steps} first steps, compared against not compared, CPU time, {options.rounds} pairs in turn: "
        f"{statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f}) times"
    )
    print(f"of that for rows: {1e3 * statistics.median(costs):.1f} ms more; the text has {size_mb:.1f} MB of tokens")
    print(f"opening the cache: {1e3 * statistics.median(start()[0] for _ in range(5)):.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
