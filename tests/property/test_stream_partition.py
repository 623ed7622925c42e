"""Law 7: a global batch has the same rows for any number of ranks and any micro-batch size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches.batch import Batch
from trainer.data.batches.stream import TrainStream
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import build_corpus
from trainer.data.sources.registry import SourceConfig, TextSourceConfig


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TrainStream:
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).write_bytes(generator.integers(97, 123, 500).astype(np.uint8).tobytes())
    sources: list[SourceConfig] = [TextSourceConfig(path=str(folder / name), domain=name) for name in ("a", "b")]
    config = DataConfig(sources=sources, split=SplitConfig(fraction=0.1), cache_dir=str(folder / "cache"))
    return TrainStream(build_corpus(config), packing="wrapped", seq_len=7, seed=3)


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch.tensors()[name] for batch in batches]) for name in batches[0].tensors()}


@settings(max_examples=60)
@given(first=st.integers(0, 10**5), size=st.integers(1, 40), micro=st.integers(1, 50))
def test_any_micro_batch_size_gives_the_same_rows_in_the_same_order(stream, first, size, micro):
    batches = stream.micro_batches(first, global_batch_size=size, micro_batch_size=micro)
    whole, parts = joined([stream.rows(first, size)]), joined(batches)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name][:size], value, rtol=0, atol=0)
    assert len(batches) == -(-size // micro)
    rows = {len(batch.tokens) for batch in batches}
    assert len(rows) == 1 and rows.pop() == -(-size // len(batches)) <= micro
    assert not parts["valid"][size:].any()


@settings(max_examples=60)
@given(first=st.integers(0, 10**5), sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_any_ranks_together_read_the_rows_of_one(stream, first, sizes):
    starts = [first + sum(sizes[:i]) for i in range(len(sizes))]
    parts = joined([stream.rows(start, size) for start, size in zip(starts, sizes, strict=True)])
    for name, value in joined([stream.rows(first, sum(sizes))]).items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
