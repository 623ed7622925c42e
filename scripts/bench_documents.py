"""Measure the cost of whole documents: packing, many domains, and the document mask.

    python scripts/bench_documents.py                                        packing, and a thousand domains
    python scripts/bench_documents.py CONFIG [a.b=c ...] [--rounds 12]       steps under both kinds of attention

Steps take turns, on the same rows, so that a drift of the machine's speed reaches both. All times are the processor's,
which other work on the machine changes less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from trainer.config.loader import load
from trainer.data.batches.best_fit import best_fit_decreasing
from trainer.data.batches.stream import TrainStream
from trainer.data.config import MixtureConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.mixture import domain_shares
from trainer.data.token_cache.token_files import TokenFile
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.training.model import build_parallel_model, numerics, resolve_kernel

P = ParamSpec("P")
T = TypeVar("T")
WARMUP = 3
LENGTHS = {"median 55": (4.0, 1.0), "median 245": (5.5, 1.2), "median 1800": (7.5, 1.0)}
"""Mean and standard deviation of the logarithm of a document's number of tokens (log-normal)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    if options.config is not None:
        measure_steps(options.config, options.overrides, options.rounds)
        return
    measure_packing(num_documents=1_000_000)
    measure_domains(num_domains=1000)


def measure_packing(num_documents: int) -> None:
    """Pack documents of random lengths."""
    generator = np.random.default_rng(0)
    for name, (mean, sigma) in LENGTHS.items():
        lengths = generator.lognormal(mean, sigma, num_documents).astype(np.int64) + 1
        for seq_len in (256, 2048, 8192):
            tails = (lengths - 1) % seq_len + 1  # what is longer fills whole rows before
            rows, seconds = timed(best_fit_decreasing, tails, seq_len)
            num_rows = rows.max() + 1 + ((lengths - tails) // seq_len).sum()
            print(
                f"{name}, rows of {seq_len}: {100 * lengths.sum() / (num_rows * seq_len):.3f} % full, {seconds:.2f} s"
            )


def measure_domains(num_domains: int) -> None:
    """Start a stream over domains of random sizes, and read batches of 512 rows."""
    generator = np.random.default_rng(0)
    texts = tuple(random_text(generator, 2 + int(generator.lognormal(5.5, 1.2))) for _ in range(num_domains))
    print(f"{num_domains} domains, {sum(text.num_documents for text in texts)} documents")
    num_tokens = [text.num_tokens for text in texts]
    for section in (MixtureConfig(), MixtureConfig(by="tokens")):
        shares = domain_shares(**section.model_dump(), sources=[0] * num_domains, weights=[1.0], num_tokens=num_tokens)
        corpus = Corpus(
            domains=tuple(str(number) for number in range(num_domains)),
            weights=shares,
            train=texts,
            validation=texts,
            tokenizer=ByteTokenizer(),
            contents=("",) * num_domains,
            fingerprint="",
            streams=(None,) * num_domains,
            folders=(Path(),) * num_domains,
        )
        for packing in ("wrapped", "bfd"):
            stream, start = timed(TrainStream, corpus, packing=packing, seq_len=512, seed=0)
            seconds = [timed(stream.rows, first, 512)[1] for first in range(0, 512 * 11, 512)]
            print(
                f"by {section.by}, {packing}: started in {start:.2f} s; blocks of {stream.mixture.block_slots}; first "
                f"batch {seconds[0]:.2f} s, others {statistics.median(seconds[1:]):.3f} s"
            )


def random_text(generator: np.random.Generator, num_documents: int) -> TokenFile:
    """Return documents of random lengths, all of the same letter."""
    needed = generator.lognormal(5.5, 1.0, num_documents).astype(np.int64) + 2  # with the end of each
    starts = np.cumsum(needed) - needed
    tokens = np.full(needed.sum() - 1, ord("a"), dtype=np.uint8)
    tokens[starts[1:] - 1] = ByteTokenizer.end_of_document
    return TokenFile(tokens=tokens, document_starts=starts, answer_starts=starts, num_bytes=len(tokens))


def measure_steps(path: Path, overrides: list[str], rounds: int) -> None:
    """Take steps of all variants in turn."""
    steps = {}
    for within in ("row", "document"):
        mask = f"model.document_mask={str(within == 'document').lower()}"
        config = load(path, [*overrides, "data.packing=bfd", mask], ExperimentConfig)
        device = runtime.start(config.parallel.device)
        config, mesh = resolve_kernel(config, device), Mesh.of_one()
        corpus = build_corpus(config.data)
        stream = TrainStream(corpus, packing="bfd", seq_len=config.model.seq_len, seed=config.seed)
        model = build_parallel_model(config, corpus.tokenizer, mesh, device, warn=print)
        steps[within] = config.engine.build(model, config.optim, numerics(config), mesh).train_step
    seconds = {within: [] for within in steps}
    for number in range(WARMUP + rounds):
        batches = stream.micro_batches(
            number * config.train.global_batch_size,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.parallel.micro_batch_size,
        )
        for within, step in steps.items():
            _, took = timed(step, batches, lr=1e-3)
            if number >= WARMUP:
                seconds[within].append(took)
    ratios = sorted(a / b for a, b in zip(seconds["document"], seconds["row"], strict=True))
    row, document = (1e3 * statistics.median(seconds[within]) for within in ("row", "document"))
    quarter = len(ratios) // 4
    print(
        f"row {row:.0f} ms, document {document:.0f} ms a step; ratio in the same round, median [middle half] "
        f"{statistics.median(ratios):.3f} [{ratios[quarter]:.3f} - {ratios[-1 - quarter]:.3f}]"
    )


def timed(work: Callable[P, T], *args: P.args, **options: P.kwargs) -> tuple[T, float]:
    """Return the result of `work` and its CPU seconds."""
    start = time.process_time()
    result = work(*args, **options)
    return result, time.process_time() - start


if __name__ == "__main__":
    main()
