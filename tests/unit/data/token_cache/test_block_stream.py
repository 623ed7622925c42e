import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.data.sources.registry import HfStreamSourceConfig
from trainer.data.token_cache.block_stream import BlockStream
from trainer.data.token_cache.input_files import FileState
from trainer.data.token_cache.splits import is_held_out
from trainer.data.token_cache.stream_block import Mark, StreamedSource
from trainer.data.token_cache.token_files import TokenFile
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.errors import DataError, ResourceError

NUM_DOCUMENTS = 90


def text(number: int) -> str:
    return f"document {number:03d} of a stream"


@pytest.fixture
def source(folder: Path) -> StreamedSource:
    """90 documents of 24 bytes in three files; blocks of about 20 training documents."""
    for file in range(3):
        rows = [json.dumps({"text": text(number)}) for number in range(30 * file, 30 * file + 30)]
        (folder / f"{file}.jsonl").write_text("\n".join(rows) + "\n")
    config = HfStreamSourceConfig(path="json", data_files="*.jsonl", block_tokens=500)
    return StreamedSource(
        config=config,
        files=tuple(FileState.of(path) for path in config.build().files()),
        folder=folder / "cache",
        tokenizer=ByteTokenizer(),
        held_out=0.1,
    )


def documents(stream: BlockStream, index: int) -> list[str]:
    block = stream.block(index)
    return [
        document.decode()
        for file in (block.train, block.validation)
        for document in bytes(file.tokens[:]).split(b"\xff")
        if document
    ]


def num_blocks(stream: BlockStream) -> int:
    index = 0
    while stream.info(index).begin.epoch == 0:
        index += 1
    return index


def test_an_epoch_of_blocks_has_every_document_once(source):
    stream = BlockStream(source)
    number = num_blocks(stream)
    assert number == 5
    for epoch in range(2):
        found = [document for i in range(number) for document in documents(stream, epoch * number + i)]
        assert sorted(found) == [text(i) for i in range(NUM_DOCUMENTS)]
    assert stream.info(number).begin == Mark(epoch=1)


def test_held_out_text_is_never_learned(source):
    stream = BlockStream(source)
    number = num_blocks(stream)
    learned = {d for i in range(number) for d in bytes(stream.block(i).train.tokens[:]).split(b"\xff")}
    held_out = {d for i in range(number) for d in bytes(stream.block(i).validation.tokens[:]).split(b"\xff")} - {b""}
    assert held_out
    assert not learned & held_out


def test_the_split_of_a_stream_depends_on_the_prompt_too(source, folder):
    """As in splits.py: otherwise, equal answers would all be on one side."""
    prompts = [f"question {number}" for number in range(40)]
    rows = [json.dumps({"asked": prompt, "text": "yes"}) for prompt in prompts]
    (folder / "answers.jsonl").write_text("\n".join(rows) + "\n")
    config = HfStreamSourceConfig(path="json", data_files="answers.jsonl", prompt="{asked}", block_tokens=5000)
    files = tuple(FileState.of(path) for path in config.build().files())
    info = BlockStream(replace(source, config=config, files=files)).info(0)
    held_out = sum(is_held_out(f"{prompt}yes", 0.1) for prompt in prompts)
    assert 0 < held_out == info.validation.num_documents < info.train.num_documents == 40 - held_out


def test_blocks_may_be_asked_for_in_any_order(source, tmp_path):
    forwards = BlockStream(source)
    expected = [documents(forwards, i) for i in range(7)]
    other = StreamedSource(
        config=source.config, files=source.files, folder=tmp_path / "other", tokenizer=source.tokenizer, held_out=0.1
    )
    stream = BlockStream(other)
    assert [documents(stream, i) for i in (6, 2, 0, 5, 1, 4, 3)] == [expected[i] for i in (6, 2, 0, 5, 1, 4, 3)]


def test_a_block_is_made_without_those_before_it_where_its_beginning_is_known(source, tmp_path, monkeypatch):
    stream = BlockStream(source)
    expected, begin = documents(stream, 6), stream.info(6).begin
    other = StreamedSource(
        config=source.config, files=source.files, folder=tmp_path / "other", tokenizer=source.tokenizer, held_out=0.1
    )
    again = BlockStream(other)
    again.resume_at(6, begin)
    assert documents(again, 6) == expected
    assert sorted(path.name for path in (tmp_path / "other").glob("block-*[0-9]")) == ["block-00000006"]


def test_token_files_of_old_blocks_go_and_come_again(source):
    stream = BlockStream(source)
    first = documents(stream, 1)
    stream.block(4)
    assert not (source.folder / "block-00000001").exists()
    assert (source.folder / "block-00000000").exists()  # every start needs it for evaluation
    assert documents(BlockStream(source), 1) == first


def test_a_block_is_made_once(source, monkeypatch):
    BlockStream(source).block(1)
    monkeypatch.setattr(StreamedSource, "build", lambda *args: pytest.fail("made again"))
    BlockStream(source).block(1)


def test_a_block_that_an_older_version_made_is_the_same_block(source):
    BlockStream(source).block(1)
    record = source.folder / "block-00000001.json"
    values = json.loads(record.read_text())
    del values["record_sha256"]
    for side in ("train", "validation"):
        del values[side]["checksums_sha256"]
    record.write_text(json.dumps(values))
    shutil.rmtree(source.folder / "block-00000001")
    assert len(documents(BlockStream(source), 1)) == 23


def test_reading_ahead_makes_the_next_block(source, monkeypatch):
    stream = BlockStream(source)
    stream.block(0)
    stream.prefetch(1)
    assert stream._prefetch is not None
    stream._prefetch.join(60)
    monkeypatch.setattr(StreamedSource, "build", lambda *args: pytest.fail("made again"))
    assert len(documents(stream, 1)) == 23


def test_prefetch_rebuilds_a_block_whose_files_are_gone(source):
    stream = BlockStream(source)
    stream.block(4)
    stream.prefetch(1)
    assert stream._prefetch is not None
    stream._prefetch.join(60)
    assert (source.folder / "block-00000001").exists()


def test_remains_of_killed_readers_go(source):
    stream = BlockStream(source)
    stream.block(0)
    remains = source.folder / ".block-00000001.0123"
    remains.mkdir()
    stream.block(1)
    assert not remains.exists()


def test_a_full_disk_is_named(source, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StreamedSource, "build", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        BlockStream(source).block(0)


def test_a_block_that_another_run_removes_meanwhile_is_made_again(source, monkeypatch):
    stream, opened = BlockStream(source), BlockStream._open
    stream.block(1)

    def removed(*args: Any) -> TokenFile:
        monkeypatch.setattr(BlockStream, "_open", opened)
        shutil.rmtree(source.folder / "block-00000001")
        return opened(*args)

    monkeypatch.setattr(BlockStream, "_open", removed)
    assert len(documents(stream, 1)) == 23


def test_a_killed_reader_leaves_nothing_half(source):
    stream = BlockStream(source)
    stream.block(0)
    stream.prefetch(1)
    assert stream._prefetch is not None
    stream._prefetch.kill()
    stream._prefetch.join()
    assert len(documents(stream, 1)) == 23


def test_a_file_that_changes_during_the_run_is_named(source, folder, fails):
    stream = BlockStream(source)
    stream.block(0)
    with (folder / "2.jsonl").open("a") as file:
        file.write('{"text": "new"}\n')
    path = (folder / "2.jsonl").resolve()
    with fails(f"{path}: changed since the run started; it must not change meanwhile; restart"):
        stream.block(1)


def test_a_stream_without_documents_is_named(folder):
    (folder / "a.jsonl").write_text('{"text": "a", "lang": "de"}\n')
    config = HfStreamSourceConfig(path="json", data_files="a.jsonl", filters=[{"column": "lang", "one_of": ["fr"]}])  # type: ignore[list-item]
    source = StreamedSource(config=config, files=(), folder=folder / "c", tokenizer=ByteTokenizer(), held_out=0.1)
    with pytest.raises(DataError, match=r"^data\.sources: json: holds no documents"):
        BlockStream(source).block(0)
