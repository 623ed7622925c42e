"""Corrupt the token cache: none of the damage is trained or evaluated on.

python -m tests.chaos.token_cache --count 1000 --seed 0

A corpus of three sources (text, rows with prompts, a stream) lies in a cache, and another one of the same shape beside
it. One file of the first is damaged at a time, in turn; then everything is read that a run reads: all rows of an epoch,
all held-out rows. Either the file is named in an error of exit code 3, or a warning names it or its folder and the text
is what it was.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.chaos.corruption import CORRUPTIONS, Corruption
from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.batches.stream import TrainStream
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import build_corpus
from trainer.data.sources.registry import HfStreamSourceConfig, JsonlSourceConfig, TextSourceConfig
from trainer.data.token_cache import checksums, token_files
from trainer.errors import DataError

_SEQ_LEN = 32
_SMALL_BYTES, _BLOCK_BYTES = 300, 256
"""So that a small text has files that are compared whole, and some of many blocks."""


@dataclass(slots=True, kw_only=True)
class Result:
    """Counts of corruptions, by kind, and those that were missed."""

    count: int = 0
    by_harm: Counter[str] = field(default_factory=Counter)
    by_file: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    """Corruptions that ended with an error, of exit code 3, that names the file."""
    not_noticed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{corruption} {times}" for corruption, times in sorted(self.by_harm.items()))
        noticed = self.count - len(self.not_noticed)
        return (
            f"{self.count} corruptions of {len(self.by_file)} files ({kinds}): {noticed} noticed, of which "
            f"{self.refused} are an error that names the file, and {noticed - self.refused} were made again"
        )


def make_cache(folder: Path) -> DataConfig:
    """Write a text and its cache into a folder, which becomes the working directory, and a cache of another text."""
    os.chdir(folder)
    config = DataConfig(
        sources=[
            TextSourceConfig(path="*.txt", domain="prose"),
            JsonlSourceConfig(path="rows.jsonl", prompt="{ask} ", domain="pairs"),
            HfStreamSourceConfig(path="parquet", data_files="rows.parquet", domain="stream", block_tokens=1 << 20),
        ],
        split=SplitConfig(kind="hash", fraction=0.3),
        cache_dir="cache",
        workers=1,
    )
    for word, cache_dir in (("other", "other"), ("words", "cache")):  # of the same lengths
        for number in range(8):
            Path(f"{number}.txt").write_text(f"{word} of text {number}. " * 30)
        rows = [{"ask": f"{word} {number:03d}", "text": f"answer {word} {number:03d}"} for number in range(120)]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = [f"{word} streamed {number:03d}" for number in range(100)]
        pq.write_table(pa.table({"text": texts}), "rows.parquet", compression="none")
        everything(config.model_copy(update={"cache_dir": cache_dir}))
    (mine,), others = (list(Path(cache).glob("*.stream")) for cache in ("cache", "other"))
    others[0].rename(others[0].with_name(mine.name))  # which is named by the times of its files, too
    return config


def everything(config: DataConfig) -> str:
    """Return a hash of all rows of an epoch and all held-out rows."""
    corpus, digest = build_corpus(config), hashlib.sha256()
    stream = TrainStream(corpus, packing="bfd", seq_len=_SEQ_LEN, seed=1)
    slot = 0
    while slot == 0 or min(number or 0 for number in stream.epochs(slot).values()) < 1:
        stream.load_blocks(slot, 64, prefetch=False)
        digest.update(stream.rows(slot, 64).targets.numpy().tobytes())
        slot += 64
    for domain in range(len(corpus.domains)):
        for batch in evaluation_batches(
            corpus, domain, packing="bfd", seq_len=_SEQ_LEN, batch_size=16, max_tokens=None
        ):
            digest.update(batch.targets.numpy().tobytes() + batch.loss_mask.numpy().tobytes())
    return digest.hexdigest()


def corrupt(config: DataConfig, count: int, seed: int, *, corruptions: dict[str, Corruption], only: str = "") -> Result:
    """Damage a file of the cache `count` times; it is as it was in the end.

    Args:
        config: of `make_cache`.
        count: corruptions that change something.
        seed: the same one draws the same corruptions.
        corruptions: to choose from.
        only: damage files whose name ends so; empty: all of them.
    """
    result, chance, expected = Result(), random.Random(seed), everything(config)
    cache = Path(config.cache_dir)
    good = {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}
    # Of the second block's tokens not all are read, and what is not read is not compared.
    unread = (".lock", "block-00000001/train.tokens", "block-00000001/validation.tokens")
    targets = [path for path, data in good.items() if data and f"{path}".endswith(only)]
    targets = [path for path in targets if not f"{path}".endswith(unread)]
    for corruption in cycle(sorted(corruptions)):
        if result.count == count:
            break
        path = targets[result.count % len(targets)]
        corruptions[corruption](path, Path("other") / path.relative_to(cache), chance)
        if all(_content(file) == _content(file, data) for file, data in good.items()):
            continue
        result.count += 1
        result.by_harm[corruption] += 1
        result.by_file[f"{path.relative_to(cache)}"] += 1
        _judge(config, expected, path, f"{corruption} of {path} (#{result.count} of seed {seed})", result)
        for file in [file for file in cache.rglob("*") if file.is_file() and file not in good]:
            file.unlink()
        for file, data in good.items():
            if not file.is_file() or file.read_bytes() != data:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(data)
    return result


def _judge(config: DataConfig, expected: str, path: Path, what: str, result: Result) -> None:
    with _warnings() as said:
        try:
            is_well = everything(config) == expected and any(str(path.parent) in line for line in said)
        except DataError as error:
            is_well = error.exit_code == 3 and str(path.parent) in str(error) and "; remove " in str(error)
            result.refused += is_well
    if not is_well:
        result.not_noticed.append(what)


def _content(path: Path, data: bytes | None = None) -> object:
    """Return what a file says: of a record its JSON, as far as it is some."""
    if data is None:
        if not path.is_file():
            return None
        data = path.read_bytes()
    if path.suffix == ".json":
        try:
            return json.loads(data)
        except ValueError:
            return data
    return data


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Gather what is warned of."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("trainer.data")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Let small files have many blocks."""
    before = token_files._SMALL_BYTES, checksums.BLOCK_BYTES
    token_files._SMALL_BYTES, checksums.BLOCK_BYTES = _SMALL_BYTES, _BLOCK_BYTES
    try:
        yield
    finally:
        token_files._SMALL_BYTES, checksums.BLOCK_BYTES = before


def main() -> None:
    """Print the counts; exit with 1 if a corruption was missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, small_blocks():
        result = corrupt(make_cache(Path(folder)), options.count, options.seed, corruptions=CORRUPTIONS)
    print(result)
    for what in result.not_noticed:
        print(f"  missed: {what}")
    raise SystemExit(1 if result.not_noticed else 0)


if __name__ == "__main__":
    main()
