"""`on_bad_row: skip` leaves out exactly the unusable records and counts them, in any process."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.records import json_lines
from trainer.data.records.bad_records import SkippedRecords, merge_skipped
from trainer.data.records.json_lines import JsonlReader
from trainer.data.sources.registry import (
    HfSourceConfig,
    HfStreamSourceConfig,
    JsonlSourceConfig,
    SourceConfig,
    TextSourceConfig,
)
from trainer.data.token_cache import workers
from trainer.data.token_cache.block_stream import BlockStream
from trainer.data.token_cache.skipped import SourceSkips, summarize_skipped, write_skipped
from trainer.data.token_cache.token_writer import TokenWriter
from trainer.errors import DataError

GOOD = [f"text {i:02d}" + "!" * (i % 7) for i in range(40)]


class Case:
    """Files with good and bad records."""

    def __init__(self, write: Callable[[bool], object], source: SourceConfig, **reasons: int) -> None:
        self.write, self.source, self.reasons = write, source, Counter(reasons)


def _lines(records: list[str | bytes], name: str) -> None:
    Path(name).write_bytes(
        b"".join((record if isinstance(record, bytes) else record.encode()) + b"\n" for record in records)
    )


def _jsonl(is_bad: bool) -> None:
    records: list[str | bytes] = [json.dumps({"text": text, "n": 1}) for text in GOOD]
    if is_bad:
        records[3:3] = ['{"text": null, "n": 1}', '{"text": "a", "n": ', '["a"]']
        records[20:20] = ['{"txt": "a", "n": 1}', '{"text": " ", "n": 1}', b'{"text": "\xff", "n": 1}']
        records += ['{"text": "\\ud800", "n": 1}', json.dumps({"text": "long " * 60, "n": 1}), '{"text": 3, "n": 1}']
        for name in ("empty.jsonl", "hollow.jsonl", "none.jsonl"):
            Path(name).write_text("\n" * (name == "hollow.jsonl"))
    _lines(records[:25], "0.jsonl")
    _lines(records[25:], "1.jsonl")


def _parquet(is_bad: bool) -> None:
    records: list[str | None] = list(GOOD)
    if is_bad:
        records[3:3] = [None, " \n", "long " * 60]
        records += [None]
        Path("2.parquet").write_bytes(b"")
        for name in ("3.parquet", "4.parquet"):
            pq.write_table(pa.table({"text": pa.array([], pa.string())}), name)
    pq.write_table(pa.table({"text": records[:20]}), "0.parquet")
    broken = pa.array([record and record.encode() for record in records[20:]], pa.binary())
    if is_bad:
        broken = pa.concat_arrays([broken, pa.array([b"a\xff"])])
    pq.write_table(
        pa.table({"text": pa.StringArray.from_buffers(len(broken), *broken.buffers()[1:], broken.buffers()[0])}),
        "1.parquet",
    )


def _csv(is_bad: bool) -> None:
    records = [f"{text},1" for text in GOOD]
    if is_bad:
        records[5:5] = ["a,b,c,d", ",1"]
        Path("1.csv").write_bytes(b"")
        Path("2.csv").write_text("text,n\n")
    Path("0.csv").write_text("text,n\n" + "\n".join(records) + "\n")


def _text(is_bad: bool) -> None:
    for number, text in enumerate(GOOD):
        Path(f"{number:02d}.txt").write_text(text)
    if is_bad:
        Path("05a.txt").write_bytes(b"")
        Path("06a.txt").write_bytes(b" \n")
        Path("07a.txt").write_bytes(b"a\xff")
        Path("08a.txt").write_text("long " * 60)
        Path("99.txt.gz").write_text("no gzip")


OF_JSONL = {"of another type": 3, "not JSON": 1, "without a column": 1, "without text": 1, "not UTF-8": 1}
OF_JSONL |= {"not Unicode": 1, "too large": 1, "a file without records": 3}
OF_PARQUET = {
    "of another type": 2,
    "without text": 1,
    "too large": 1,
    "that cannot be read": 1,
    "a file without records": 3,
}
CASES = {
    "jsonl": Case(_jsonl, JsonlSourceConfig(path="*.jsonl", domain="d"), **OF_JSONL),
    "json of datasets": Case(_jsonl, HfSourceConfig(path="json", data_files="*.jsonl", domain="d"), **OF_JSONL),
    "parquet": Case(_parquet, HfSourceConfig(path="parquet", data_files="*.parquet", domain="d"), **OF_PARQUET),
    "stream": Case(
        _parquet,
        HfStreamSourceConfig(path="parquet", data_files="*.parquet", domain="d", block_tokens=60),
        **OF_PARQUET,
    ),
    "csv": Case(
        _csv,
        HfSourceConfig(path="csv", data_files="*.csv", domain="d"),
        **{"of too many fields": 1, "without text": 1, "a file without records": 2},
    ),
    "text": Case(
        _text,
        TextSourceConfig(path="*.txt*", domain="d"),
        **{"without text": 2, "not UTF-8": 1, "too large": 1, "damaged gzip data": 1},
    ),
}


@pytest.fixture(autouse=True)
def _small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits: several parts of each source, and records over the limit."""
    monkeypatch.setattr(json_lines, "_PART_BYTES", 300)
    monkeypatch.setattr(json_lines, "_CHUNK_BYTES", 100)
    monkeypatch.setattr("trainer.data.sources.text._PART_BYTES", 100)
    monkeypatch.setattr(json_lines, "MAX_RECORD_BYTES", 200)
    monkeypatch.setattr("trainer.data.records.text_files.MAX_DOCUMENT_BYTES", 200)


def _config(source: SourceConfig, *, cache: str = "cache") -> DataConfig:
    return DataConfig(sources=[source], split=SplitConfig(kind="hash", fraction=0.3), cache_dir=cache, workers=1)


def _skipping(source: SourceConfig) -> SourceConfig:
    return source.model_copy(update={"on_bad_row": "skip"})


def _content(corpus: Corpus) -> tuple[list[bytes], SkippedRecords]:
    """Return the documents of an epoch by side, and the skipped records."""
    (stream,) = corpus.streams
    if stream is None:
        sides = [bytes(file.tokens[:]) for file in (*corpus.train, *corpus.validation)]
        return sides, merge_skipped(one.records for one in corpus.skipped)
    sides, skipped = [[], []], []
    for index in count():
        block = stream.block(index)
        if block.info.begin.epoch:
            return [b"\xff".join(side) for side in sides], merge_skipped(skipped)
        skipped.append(block.info.skipped)
        for side, file in zip(sides, (block.train, block.validation), strict=True):
            side += [bytes(file.tokens[:])] * bool(file.num_tokens)
    raise AssertionError("there is a second epoch")


@pytest.mark.parametrize("kind", CASES)
def test_skipping_leaves_the_rest_unchanged_and_counts_bad_records(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    case.write(True)
    with pytest.raises(DataError):
        _content(build_corpus(_config(case.source)))
    found, skipped = _content(build_corpus(_config(_skipping(case.source))))
    assert Counter(skipped.reasons) == case.reasons
    assert len(skipped.first) == min(10, sum(case.reasons.values()))
    assert all(str(Path(line.split(":")[0]).name) in {p.name for p in tmp_path.iterdir()} for line in skipped.first)
    for file in [*tmp_path.glob("*.*")]:
        file.unlink()
    case.write(False)
    expected, nothing = _content(build_corpus(_config(case.source, cache="other")))
    assert found == expected
    assert nothing.count == 0


def _until(after: int) -> Callable[..., None]:
    """Return a write function that is killed after some documents."""
    left, write = count(), TokenWriter.write

    def until(self: TokenWriter, *args: Any, **options: Any) -> None:
        if next(left) == after:
            raise KeyboardInterrupt
        write(self, *args, **options)

    return until


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_killed_readers_skip_the_same_records(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CASES[kind].write(True)
    config = _config(_skipping(CASES[kind].source))
    expected = _content(build_corpus(config.model_copy(update={"cache_dir": "undisturbed"})))
    for after in (5, 20):
        with monkeypatch.context() as context:
            context.setattr(TokenWriter, "write", _until(after))
            with pytest.raises(KeyboardInterrupt):
                build_corpus(config)
    assert _content(build_corpus(config)) == expected
    monkeypatch.setattr(workers, "_MIN_PROCESS_BYTES", 1)
    forks = workers.multiprocessing.get_context("fork")  # forks inherit the small limits
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: forks)
    assert _content(build_corpus(config.model_copy(update={"cache_dir": "many", "workers": 3}))) == expected


@pytest.mark.parametrize(
    "source", [JsonlSourceConfig(path="0.jsonl"), HfStreamSourceConfig(path="json", data_files="0.jsonl")]
)
def test_a_source_of_which_nothing_is_left_is_refused(source: SourceConfig) -> None:
    Path("0.jsonl").write_text('{"txt": "a"}\n' * 3)
    with pytest.raises(DataError) as error:
        build_corpus(_config(_skipping(source)))
    assert "holds no usable documents: on_bad_row: skip left out 3 (3 without a column), the first of " in str(
        error.value
    )
    assert "0.jsonl:1: no column 'text'; the record has txt (did you mean 'txt'?)" in str(error.value)


def test_skip_does_not_change_a_text_without_bad_records(folder: Path) -> None:
    _jsonl(False)
    source = JsonlSourceConfig(path="*.jsonl")
    one, two = build_corpus(_config(source)), build_corpus(_config(_skipping(source)))
    assert one.fingerprint == two.fingerprint
    assert one.folders != two.folders, "another run may add a bad record"


def test_a_file_that_cannot_be_read_to_its_end_is_an_error_all_the_same(folder: Path) -> None:
    _parquet(False)
    Path("1.parquet").write_bytes(Path("1.parquet").read_bytes()[:-3])
    with pytest.raises(DataError, match="cannot be read"):
        build_corpus(_config(_skipping(CASES["parquet"].source)))


@pytest.mark.parametrize("kind", CASES)
def test_an_error_suggests_once_to_skip_the_record(kind: str) -> None:
    CASES[kind].write(True)
    with pytest.raises(DataError) as error:
        _content(build_corpus(_config(CASES[kind].source)))
    assert str(error.value).endswith(", or skip it: on_bad_row: skip")
    assert str(error.value).count("on_bad_row") == 1


def test_a_csv_line_with_too_many_fields_is_a_bad_record(folder: Path) -> None:
    Path("0.csv").write_text("text\na\nb,c,d\ne\n")
    with pytest.raises(DataError, match=r"Expected 1 fields in line 3, saw 3.*, or skip it: on_bad_row: skip$"):
        build_corpus(_config(HfSourceConfig(path="csv", data_files="0.csv")))


def test_no_way_on_is_named_where_there_is_none(folder: Path) -> None:
    Path("records.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r"correct or remove it$"):  # tasks have no such option
        list(JsonlReader("records.jsonl").records())
    Path("torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 40)[:-9])
    with pytest.raises(DataError, match=r"copy or compress the file again$"):
        list(JsonlSourceConfig(path="torn.jsonl.gz").build().documents())


def test_one_record_is_singular_in_the_summary(folder: Path) -> None:
    records = SkippedRecords(reasons={"not JSON": 1}, first=["a.jsonl:7: not JSON"])
    assert summarize_skipped([SourceSkips(0, None, records)]).startswith("left out 1 record that cannot be used")


def test_the_list_has_a_line_for_each_source_and_block_and_survives_a_resume(folder: Path) -> None:
    path = folder / "skipped_rows.jsonl"
    records = SkippedRecords(reasons={"not JSON": 2, "too large": 3}, first=["a.jsonl:7: not JSON"])
    ingested, first, later = SourceSkips(2, None, records), SourceSkips(0, 0, records), SourceSkips(0, 5, records)
    assert (
        summarize_skipped([ingested, first])
        == "left out 10 records that cannot be used (6 too large, 4 not JSON), of data.sources 0, 2"
    )
    write_skipped(path, [ingested, first], keeps_blocks=False)
    write_skipped(path, [ingested, later], keeps_blocks=True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"source": index, "block": block, "rows": 5, "reasons": records.reasons, "first": records.first}
        for index, block in ((0, 0), (0, 5), (2, None))
    ]
    write_skipped(path, [], keeps_blocks=False)
    assert not path.exists()


def test_blocks_of_a_stream_count_each_record_once_on_any_host(folder: Path) -> None:
    _parquet(True)
    corpus = build_corpus(_config(_skipping(CASES["stream"].source)))
    stream = corpus.streams[0]
    assert stream is not None
    infos = [stream.info(index) for index in range(4)]
    again = BlockStream(stream._source)
    for index, info in enumerate(infos):
        again.resume_at(index, info.begin)
        again._folder(index).with_suffix(".json").unlink()
        assert again.info(index) == info
