import gzip
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from trainer.data.records.bad_records import raise_on_bad
from trainer.data.records.base import Record
from trainer.data.records.registry import HfRecordsConfig
from trainer.errors import DataError

ROWS = [{"text": f"record {i}", "n": i} for i in range(5)]


def read(path: str, **options: Any) -> list[Record]:
    return list(HfRecordsConfig(path=path, **options).reader().records())


def _jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def _write_arrow() -> str:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile("records.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return "records.arrow"


def _write_parquet() -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), "records.parquet")
    return "records.parquet"


def _write(name: str, content: bytes) -> Callable[[], str]:
    def write() -> str:
        Path(name).write_bytes(content)
        return name

    return write


@pytest.mark.parametrize(
    ("format_", "write"),
    [
        ("parquet", _write_parquet),
        ("arrow", _write_arrow),
        ("json", _write("records.jsonl", _jsonl(ROWS))),
        ("json", _write("records.jsonl.gz", gzip.compress(_jsonl(ROWS)))),
        ("json", _write("records.jsonl.zst", zstandard.compress(_jsonl(ROWS)))),
        ("json", _write("records.json", json.dumps(ROWS).encode())),
        ("csv", _write("records.csv", b"text,n\n" + b"".join(f"record {i},{i}\n".encode() for i in range(5)))),
    ],
)
def test_every_local_format_gives_its_records_with_file_and_number(format_, write):
    name = write()
    records = read(format_, data_files=name)
    assert [record.values for record in records] == ROWS
    assert all(name in record.where for record in records)
    assert len({record.where for record in records}) == 5


def test_a_folder_is_a_data_set_with_splits():
    Path("set").mkdir()
    Path("set/train.jsonl").write_bytes(_jsonl(ROWS))
    Path("set/test.jsonl").write_bytes(_jsonl(ROWS[:2]))
    assert len(read("set")) == 5
    assert len(read("set", split="test")) == 2


def test_each_file_is_a_part():
    for i in range(3):
        pq.write_table(pa.Table.from_pylist(ROWS[i : i + 1]), f"{i}.parquet")
    records = HfRecordsConfig(path="parquet", data_files="*.parquet").reader()
    assert [[record.values["n"] for record in raise_on_bad(records.entries(part))] for part in records.parts()] == [
        [0],
        [1],
        [2],
    ]


def test_na_is_a_text_like_any_other():
    Path("records.csv").write_text("text\nNA\nnull\nx\n")
    assert [record.values["text"] for record in read("csv", data_files="records.csv")] == ["NA", "null", "x"]


def test_a_number_beyond_the_first_block_stays_a_number():
    # The reader of the library would return the string "3".
    Path("records.jsonl").write_bytes(_jsonl([{"text": "a" * 2000}] * 10_000 + [{"text": 3}]))
    last = read("json", data_files="records.jsonl")[-1]
    assert last.values == {"text": 3}
    assert last.where.endswith("records.jsonl:10001")


def options(**values: Any) -> dict[str, Any]:
    return values


BAD = {
    "a missing file": (options(path="parquet", data_files="no.parquet"), "no.parquet: no such file"),
    "a glob without matches": (options(path="csv", data_files="*.tsv"), "*.tsv: the glob matches no file"),
    "a folder as a file": (options(path="json", data_files="folder"), "folder: is a folder"),
    "no parquet": (options(path="parquet", data_files="bad.parquet"), "parquet:train: cannot be read ("),
    "a torn csv": (
        options(path="csv", data_files="torn.csv"),
        "torn.csv: record 1 or one of the next 100: cannot be read (",
    ),
    "a truncated zst": (options(path="json", data_files="cut.jsonl.zst"), "cut.jsonl.zst: damaged zstd data ("),
    "no such split": (options(path="set", split="test"), "set:test: no split 'test'; the data set has train"),
    "a folder without data": (options(path="./folder"), "./folder:train: cannot be read ("),
    "an empty json": (options(path="json", data_files="empty.jsonl"), "empty.jsonl: holds no records"),
    "an empty parquet": (options(path="parquet", data_files="empty.parquet"), "empty.parquet: "),
    "an unreachable hub": (options(path="someone/something"), "someone/something:train: cannot be reached ("),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unreadable_data_set_is_a_one_line_error(name):
    given, reason = BAD[name]
    for folder in ("folder", "set"):
        Path(folder).mkdir()
    Path("set/train.jsonl").write_bytes(_jsonl(ROWS))
    Path("bad.parquet").write_text("this is no parquet file")
    Path("torn.csv").write_text("a,b\n1,2\n3,4,5\n")
    Path("cut.jsonl.zst").write_bytes(zstandard.compress(_jsonl(ROWS))[:-4])
    Path("empty.jsonl").touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), "empty.parquet")
    with pytest.raises(DataError) as error:
        read(**given)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


class TransportError(Exception):
    """An error with the class name of httpx and its forks."""


def _no_address() -> NoReturn:
    try:
        raise socket.gaierror(-2, "Name or service not known")
    except OSError as error:
        raise RuntimeError("[Errno -2] Name or service not known") from error


def _no_answer() -> NoReturn:
    raise TransportError("timed out")


@pytest.mark.parametrize("fail", [_no_address, _no_answer])
def test_a_network_error_is_not_blamed_on_the_data(fail: Callable[[], NoReturn], monkeypatch):
    monkeypatch.setattr("trainer.data.records.hf.pin_commits", lambda _: fail())
    with pytest.raises(DataError, match=r"^hf://datasets/a/b/c\.csv: cannot be reached \(.*check the network, or give"):
        read(path="csv", data_files="hf://datasets/a/b/c.csv")


def _card(configs: str) -> None:
    Path("set/data").mkdir(parents=True)
    Path("outside").mkdir()
    Path("set/data/train.jsonl").write_text('{"text": "inside"}\n')
    Path("outside/secret.jsonl").write_text('{"text": "secret"}\n')
    Path("set/README.md").write_text(f"---\nconfigs:\n- config_name: default\n{configs}\n---\n")


@pytest.mark.parametrize(
    "configs",
    [
        "  data_files: ../outside/secret.jsonl",
        "  data_files: ../outside/*.jsonl",
        "  data_files: data/../../outside/secret.jsonl",
        "  data_files: {folder}/outside/secret.jsonl",
        "  data_dir: ../outside",
        "  data_files: [{{split: train, path: data/train.jsonl}}, {{split: test, path: ../outside/secret.jsonl}}]",
    ],
)
def test_a_data_set_that_names_files_outside_of_it_is_refused(tmp_path, configs):
    _card(configs.format(folder=tmp_path))
    with pytest.raises(DataError) as error:
        read("set")
    assert str(error.value).startswith("set:train: its README.md names ")
    assert str(error.value).endswith(
        "secret.jsonl, which is not in set; a data set may only read its own files; correct README.md, or name files "
        "by data_files"
    )


def test_a_data_set_names_files_in_it_which_may_be_links(tmp_path):
    _card("  data_files: data/*.jsonl")
    Path("set/data/train.jsonl").rename("blob")
    Path("set/data/train.jsonl").symlink_to(tmp_path / "blob")  # as in the cache of the hub
    assert [record.values for record in read("set")] == [{"text": "inside"}]


def test_files_that_the_config_names_may_be_anywhere():
    _card("  data_files: data/*.jsonl")
    assert [record.values for record in read("set", data_files="../outside/*.jsonl")] == [{"text": "secret"}]


def test_an_unreadable_record_is_named(tmp_path):
    bytes_ = pa.array([b"a"] * 7 + [b"\xff"] + [b"b"])
    column = pa.StringArray.from_buffers(9, *bytes_.buffers()[1:])
    pq.write_table(pa.table({"text": column}), "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: record 8: cannot be read \('utf-8' codec can't decode byte 0xff"):
        read("parquet", data_files="a.parquet")


def test_a_record_over_the_limit_is_named(monkeypatch):
    monkeypatch.setattr("trainer.data.records.json_lines.MAX_RECORD_BYTES", 20)
    pq.write_table(pa.table({"text": ["a" * 20, "é" * 11]}), "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: record 2: more than 20 bytes in one record; that is the limit"):
        read("parquet", data_files="a.parquet")


def test_an_empty_file_among_others_is_named():
    for name in ("0.parquet", "2.parquet"):
        Path(name).touch()
    pq.write_table(pa.table({"text": ["a"]}), "1.parquet")
    with pytest.raises(
        DataError, match=r"0\.parquet: holds no records \(empty or only white space\); every file needs some"
    ):
        read("parquet", data_files="*.parquet")
