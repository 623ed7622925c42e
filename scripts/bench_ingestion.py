"""Measure how fast text becomes tokens, and how fast a mixture of many sources starts.

    OMP_NUM_THREADS=1 python scripts/bench_ingestion.py [--mb 100] [--sources 1000]

Rates are of processor time, of this process and those that it starts, so that a busy machine does not count.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.config import DataConfig
from trainer.data.corpus import build_corpus
from trainer.data.sources.registry import (
    HfSourceConfig,
    InstalledSourceConfig,
    JsonlSourceConfig,
    SourceConfig,
    TextSourceConfig,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=100, help="megabytes of text")
    parser.add_argument("--sources", type=int, default=1000, help="sources of the mixture")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write(options.mb * 1_000_000)
        for name, source in SOURCES.items():
            for workers in (1, 2):
                ingest(name, source, workers)
        start_many(options.sources)


SOURCES: dict[str, SourceConfig] = {
    "text, one file": TextSourceConfig(path="all.txt"),
    "jsonl, rows of 1.5 kB": JsonlSourceConfig(path="long.jsonl"),
    "jsonl, rows of 60 B": JsonlSourceConfig(path="short.jsonl"),
    "parquet, rows of 1.5 kB": HfSourceConfig(path="parquet", data_files="*.parquet"),
}


def write(num_bytes: int) -> None:
    """Write the same text in every format; the format of short records gets a quarter of it."""
    words = " ".join(d.text for d in InstalledSourceConfig(domains=["cpp"]).build().documents()).split()
    rows = list(pieces(words, num_bytes, length=190))
    Path("all.txt").write_text("\n".join(rows))
    Path("long.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    Path("short.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in pieces(words, num_bytes // 4, length=7))
    )
    for index in range(8):
        pq.write_table(pa.table({"text": rows[index::8]}), f"{index}.parquet")


def pieces(words: list[str], num_bytes: int, *, length: int) -> Iterator[str]:
    generator, written = random.Random(0), 0
    while written < num_bytes:
        start = generator.randrange(len(words) - length)
        row = f"{written} " + " ".join(words[start : start + length])
        written += len(row)
        yield row


def ingest(name: str, source: SourceConfig, workers: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(sources=[source], cache_dir=cache, workers=workers)
        before_s, start_s = processor_s(), time.perf_counter()
        corpus = build_corpus(config)
        wall_s, used_s = time.perf_counter() - start_s, processor_s() - before_s
    mb = sum(file.num_bytes for file in (*corpus.train, *corpus.validation)) / 1e6
    print(
        f"{name:24} {workers} processes: {mb:4.0f} MB in {wall_s:5.1f} s; {mb / used_s:5.1f} MB/s of a core", flush=True
    )


def start_many(number: int) -> None:
    for index in range(number):
        Path(f"source-{index}.txt").write_text(f"text number {index} " * 20)
    sources: list[SourceConfig] = [
        TextSourceConfig(path=f"source-{index}.txt", domain=f"d{index}") for index in range(number)
    ]
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(sources=sources, cache_dir=cache)
        for when in ("first start", "next start"):
            start_s = time.perf_counter()
            build_corpus(config)
            print(f"{number} sources, {when}: {time.perf_counter() - start_s:.1f} s", flush=True)


def processor_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
