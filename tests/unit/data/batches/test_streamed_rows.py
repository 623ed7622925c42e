"""Every document of a stream is read once in each epoch, on any ranks, however the run is resumed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.batches.batch import Batch
from trainer.data.batches.stream import TrainStream
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.sources.registry import HfStreamSourceConfig, SourceConfig, TextSourceConfig
from trainer.data.token_cache.splits import is_held_out
from trainer.errors import DataError

SEQ_LEN = 16
LEARNED = [text for i in range(80) if not is_held_out(text := f"text {i:03d}" + "!" * (i % 5), 0.2)]


@pytest.fixture
def config(folder: Path) -> DataConfig:
    for file in range(2):
        rows = [json.dumps({"text": f"text {i:03d}" + "!" * (i % 5)}) for i in range(40 * file, 40 * file + 40)]
        (folder / f"{file}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "other.txt").write_text("abcdefgh" * 80)
    sources: list[SourceConfig] = [
        HfStreamSourceConfig(path="json", data_files="*.jsonl", block_tokens=200, domain="s"),
        TextSourceConfig(path="other.txt", domain="t"),
    ]
    return DataConfig(sources=sources, split=SplitConfig(fraction=0.2), cache_dir="cache", packing="bfd")


def stream_of(corpus: Corpus, config: DataConfig) -> TrainStream:
    return TrainStream(corpus, packing=config.packing, seq_len=SEQ_LEN, seed=3)


def texts(batches: list[Batch]) -> list[str]:
    """Return the documents of domain s in batches, rebuilt from their targets."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            if batch.domain[row, 0] != 0:
                continue
            valid = batch.valid[row]
            targets = bytes(batch.targets[row][valid].tolist())
            found += [document.decode() for document in targets.split(b"\xff")[:-1]]
    return found


def slots_of_epochs(stream: TrainStream, number: int) -> int:
    """Return the exact number of the run's rows that cover the stream this many times."""
    slot = 0
    while (stream.epochs(slot + 1)["s"] or 0) < number:
        slot += 1
    return slot


def test_every_document_is_learned_once_in_each_epoch(config):
    stream = stream_of(build_corpus(config), config)
    for epochs in (1, 2, 3):
        read = texts([stream.rows(0, slots_of_epochs(stream, epochs))])
        assert Counter(read) == {text: epochs for text in LEARNED}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_resumed_on_another_host_reads_the_same_rows(config, folder, world_size):
    stream = stream_of(build_corpus(config), config)
    expected = stream.rows(0, 90)
    batches: list[Batch] = []
    position, places = 0, stream.stream_positions(0)
    for steps, ranks in ((4, 1), (1, 3), (7, world_size), (3, 2)):
        # Another host: an empty cache, and only the position.
        elsewhere = config.model_copy(update={"cache_dir": f"cache-{position}"})
        again = stream_of(build_corpus(elsewhere), elsewhere)
        again.resume_at(json.loads(json.dumps(places)))
        for _ in range(steps):
            if again.needs_new_block(position, 6):
                again.load_blocks(position, 6, prefetch=False)
            for rank in range(ranks):
                batches += again.micro_batches(
                    position, global_batch_size=6, micro_batch_size=4, rank=rank, world_size=ranks
                )
            position += 6
        places = again.stream_positions(position)
    rows = {int(i): b.tokens[r] for b in batches for r, i in enumerate(b.sample_id[:, 0].tolist()) if i >= 0}
    assert sorted(rows) == list(range(90))
    assert all((rows[slot] == expected.tokens[slot]).all() for slot in range(90))


def test_a_stream_whose_share_shrinks_in_a_resumed_run_is_named(config):
    places = stream_of(build_corpus(config), config).stream_positions(120)
    stream, text = config.sources
    less = config.model_copy(update={"sources": [stream, text.model_copy(update={"weight": 9.0})]})
    again = stream_of(build_corpus(less), less)
    again.resume_at(places)
    with pytest.raises(DataError, match=r"^data\.sources: s: the run resumed at row \d+ of this stream but now needs"):
        again.load_blocks(120, 6, prefetch=False)


def test_text_before_the_resumed_position_is_not_read_again(config, monkeypatch):
    stream = stream_of(build_corpus(config), config)
    position = slots_of_epochs(stream, 1) + 30
    stream.rows(position - 6, 6)
    places = stream.stream_positions(position)
    assert places["s"]["block"] > 3
    elsewhere = config.model_copy(update={"cache_dir": "elsewhere"})
    again = stream_of(build_corpus(elsewhere), elsewhere)
    again.resume_at(places)
    again.rows(position, 6)
    made = sorted(path.name for path in Path("elsewhere").glob("*.stream/*.json"))
    assert made[0] == "block-00000000.json"  # needed for evaluation
    assert made[1] >= f"block-{places['s']['block']:08d}.json"


def test_ranks_agree_on_when_they_wait(config):
    streams = [stream_of(build_corpus(config), config) for _ in range(2)]
    answers: list[list[bool]] = [[], []]
    for rank, stream in enumerate(streams):
        for step in range(12):
            answers[rank].append(stream.needs_new_block(step * 6, 6))
            if answers[rank][-1]:
                stream.load_blocks(step * 6, 6, prefetch=False)
            stream.micro_batches(step * 6, global_batch_size=6, micro_batch_size=6, rank=rank, world_size=2)
    assert answers[0] == answers[1]
    assert True in answers[0][1:]


def test_windows_of_a_stream_are_read_once(config):
    crossing = config.model_copy(update={"packing": "wrapped"})
    stream = stream_of(build_corpus(crossing), crossing)
    rows = stream.rows(0, slots_of_epochs(stream, 1))
    seen = Counter(bytes(row) for row in np.asarray(rows.tokens[rows.domain[:, 0] == 0], dtype=np.uint8))
    assert set(seen.values()) == {1}
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("options", "key"),
    [({"split": SplitConfig(kind="tail")}, "split.kind"), ({"mixture": {"by": "tokens"}}, "mixture.by")],
)
def test_options_that_a_stream_cannot_have_are_refused(options: dict[str, Any], key: str):
    with pytest.raises(ValueError, match=f"{key}: .*hf_stream"):
        DataConfig(sources=[HfStreamSourceConfig(path="a/b")], **options)


def test_a_stream_that_is_too_short_for_a_row_is_named(config, fails):
    crossing = config.model_copy(update={"packing": "wrapped"})
    stream = TrainStream(build_corpus(crossing), packing="wrapped", seq_len=300, seed=0)
    with fails(
        "data.sources: s: a row needs 301 tokens, and no block of the stream has them; give it more text, or use a "
        "smaller model.seq_len"
    ):
        stream.rows(0, 10)
