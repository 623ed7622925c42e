"""For every kind of source, each document is learned once in an epoch, however the run is interrupted and resumed."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import registries
from trainer.data.batches.batch import Batch
from trainer.data.batches.stream import TrainStream
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import build_corpus
from trainer.data.records import json_lines
from trainer.data.sources import installed
from trainer.data.sources.base import Document
from trainer.data.sources.registry import (
    ChatSourceConfig,
    HfChatSourceConfig,
    HfChatStreamSourceConfig,
    HfSourceConfig,
    HfStreamSourceConfig,
    InstalledSourceConfig,
    JsonlSourceConfig,
    SourceConfig,
    TextSourceConfig,
)
from trainer.data.token_cache import read_tasks
from trainer.data.token_cache.splits import is_held_out
from trainer.data.token_cache.token_writer import TokenWriter

ALL = [f"text {i:03d}" + "!" * (i % 7) for i in range(90)]
EPOCHS, SEQ_LEN = 3, 32


def text(folder: Path) -> SourceConfig:
    for index, document in enumerate(ALL):
        (folder / f"{index:03d}.txt").write_text(document)
    return TextSourceConfig(path="*.txt", domain="d")


def lines(folder: Path) -> SourceConfig:
    records = [json.dumps({"text": document}) + "\n" for document in ALL]
    for file in range(3):
        (folder / f"{file}.jsonl").write_text("".join(records[file * 30 : file * 30 + 30]))
    return JsonlSourceConfig(path="*.jsonl", domain="d")


def parquet(folder: Path) -> SourceConfig:
    for file in range(3):
        pq.write_table(pa.table({"text": ALL[file * 30 : file * 30 + 30]}), folder / f"{file}.parquet")
    return HfSourceConfig(path="parquet", data_files="*.parquet", domain="d")


def stream(folder: Path) -> SourceConfig:
    parquet(folder)
    return HfStreamSourceConfig(path="parquet", data_files="*.parquet", domain="d", block_tokens=200)


def chats(folder: Path) -> SourceConfig:
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": document}] for document in ALL]
    records = [json.dumps({"messages": messages}) + "\n" for messages in turns]
    for file in range(3):
        (folder / f"{file}.jsonl").write_text("".join(records[file * 30 : file * 30 + 30]))
    return ChatSourceConfig(path="*.jsonl", domain="d")


def hf_chats(folder: Path) -> SourceConfig:
    chats(folder)
    return HfChatSourceConfig(path="json", data_files="*.jsonl", domain="d")


def chat_stream(folder: Path) -> SourceConfig:
    chats(folder)
    return HfChatStreamSourceConfig(path="json", data_files="*.jsonl", domain="d", block_tokens=300)


def of_machine(folder: Path) -> SourceConfig:
    return InstalledSourceConfig(domains=["english"])


SOURCES: dict[str, Callable[[Path], SourceConfig]] = {
    "text": text,
    "jsonl": lines,
    "hf": parquet,
    "hf_stream": stream,
    "chat": chats,
    "hf_chat": hf_chats,
    "hf_chat_stream": chat_stream,
    "installed": of_machine,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of each source, and comparable documents of the installed text."""
    monkeypatch.setattr(json_lines, "_PART_BYTES", 500)
    monkeypatch.setattr("trainer.data.sources.text._PART_BYTES", 100)

    def documents(self: object) -> Iterator[Document]:
        yield from (Document(name=f"{i}", domain="english", text=made) for i, made in enumerate(ALL))

    monkeypatch.setattr(installed.InstalledSource, "read", lambda self, part: documents(self))


class Killed(BaseException):
    """Stands for a signal."""


def broken_off(config: DataConfig, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Ingest the corpus up to some document."""
    left = after
    write = TokenWriter.write

    def until(self: TokenWriter, *args: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        write(self, *args, **options)

    with monkeypatch.context() as context:
        context.setattr(TokenWriter, "write", until)
        with pytest.raises(Killed):
            build_corpus(config, seq_len=SEQ_LEN)


def said(document: Document) -> str:
    return document.text if document.chat is None else document.chat.messages[-1]["content"]


def documents_in(batches: list[Batch]) -> list[str]:
    """Return the documents of batches, rebuilt from their targets; of a chat, the answer between its markers."""
    records = [(batch, record) for batch in batches for record in range(len(batch.tokens))]
    targets = [bytes(batch.targets[record][batch.valid[record]].tolist()) for batch, record in records]
    documents = [document for of_row in targets for document in of_row.split(b"\xff")[:-1]]
    return [document.rpartition(b"\xfa")[2].removesuffix(b"\xfe").decode() for document in documents]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", SOURCES)
def test_each_document_is_learned_once_in_an_epoch_wherever_a_run_is_broken_off(kind, folder, monkeypatch):
    source = SOURCES[kind](folder)
    config = DataConfig(
        sources=[source], split=SplitConfig(kind="hash", fraction=0.2), cache_dir="cache", packing="bfd", workers=1
    )
    for after in (5, 12 if kind.endswith("stream") else 40):  # only the first block of a stream is read beforehand
        broken_off(config, monkeypatch, after=after)
    size, position, places = 5, 0, None
    batches: list[Batch] = []
    attempts = [(3, 1), (2, 3), (0, 2), (4, 2), (1, 1)]
    for number in range(1000):
        again = TrainStream(build_corpus(config, seq_len=SEQ_LEN), packing="bfd", seq_len=SEQ_LEN, seed=3)
        if places is not None:
            again.resume_at(json.loads(json.dumps(places)))
        steps, ranks = attempts[number % len(attempts)]
        for step in range(steps + 1):
            if again.needs_new_block(position, size):
                again.load_blocks(position, size, prefetch=False)
            found = [
                again.micro_batches(position, global_batch_size=size, micro_batch_size=2, rank=rank, world_size=ranks)
                for rank in range(ranks)
            ]
            if step == steps:  # killed during accumulation: the step does not count
                break
            batches += [batch for of_rank in found for batch in of_rank]
            position += size
        places = again.stream_positions(position)
        if (again.epochs(position)[config_domain(source)] or 0) >= EPOCHS:
            break
    read = Counter(documents_in(batches))
    documents = source.build().documents()
    assert set(read) == {said(document) for document in documents if not is_held_out(document.text, 0.2)}
    # The last step may have begun another epoch, whose rows are whole documents: each at most once more.
    assert min(read.values()) == EPOCHS
    assert max(read.values()) <= EPOCHS + 1
    by_slot = Counter(int(i) for batch in batches for i in batch.sample_id[:, 0].tolist() if i >= 0)
    assert by_slot == Counter(range(position))


def config_domain(source: SourceConfig) -> str:
    return "english" if isinstance(source, InstalledSourceConfig) else source.domain


def test_no_kind_of_source_is_left_out():
    assert set(SOURCES) == set(registries.SOURCES)


def test_parts_that_were_read_are_not_read_again(folder, monkeypatch):
    config = DataConfig(sources=[lines(folder)], split=SplitConfig(kind="hash"), cache_dir="cache", workers=1)
    broken_off(config, monkeypatch, after=60)
    done: list[str] = []
    run = read_tasks.ReadTask.run
    monkeypatch.setattr(
        read_tasks.ReadTask, "run", lambda self, *args: (done.append(self.folder.name), run(self, *args))
    )
    build_corpus(config)
    assert 0 < len(done) < len(list(JsonlSourceConfig(path="*.jsonl").build().parts()))
