"""Small files that expand to huge records are refused in one line, within the memory limit."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.launched_ranks import ROOT

BIG = 80 << 20
SCRIPT = """
import json, resource, sys
from pydantic import TypeAdapter
from trainer.data.records import hf, json_lines, memory_limit, text_files
from trainer.data.sources.registry import SourceConfig
from trainer.errors import DataError
import datasets, torch.utils.data  # imported by datasets when it streams

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a hard limit, whatever the code under test sets
text_files.MAX_DOCUMENT_BYTES = json_lines.MAX_RECORD_BYTES = 4 << 20
memory_limit.MAX_READING_BYTES = 48 << 20
results = {}
for name, values in json.loads(sys.argv[1]).items():
    source = TypeAdapter(SourceConfig).validate_python(values).build()
    if name == "good":
        results[name] = len(list(source.documents()))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        continue
    try:
        results[name] = str([len(document.text) for document in source.documents()])
    except DataError as error:
        results[name] = str(error)
print(json.dumps([results, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def _packed(name: str, *content: bytes) -> Path:
    """Write a compressed file; a piece b"x" of its content is repeated BIG times."""
    path = Path(name)
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else zstandard.open(path, "wb") as file:
        for piece in content:
            for _ in range(BIG >> 20 if piece == b"x" else 1):
                file.write(piece * (1 << 20) if piece == b"x" else piece)
    return path


def _parquet_of_one_text() -> Path:
    """A thousand records of the same 10 MB, stored once: the file has 588 bytes."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * (10 << 20)]))
    options: Any = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pq.write_table(pa.table({"text": texts}), "a.parquet", **options)
    return Path("a.parquet")


def _parquet_of_one_row() -> Path:
    options: Any = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(pa.table({"text": ["x" * BIG]}), "b.parquet", **options)
    return Path("b.parquet")


def _arrow(name: str, table: pa.Table) -> Path:
    with pa.OSFile(name, "wb") as file:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(file, table.schema, options=options) as writer:
            writer.write_table(table)
    return Path(name)


def _arrow_of_one_text() -> pa.Table:
    return pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 100), pa.array(["x" * (4 << 20)]))})


def _hf(format_: str, path: Path) -> dict[str, Any]:
    return {"kind": "hf", "path": format_, "data_files": str(path)}


def test_reading_beyond_the_limit_is_refused_without_allocating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(5000)]}), "good.parquet")
    record = b'{"text": "', b"x", b'"}'
    too_long, too_much = "more than 4194304 bytes in one", "needs more than 48 MiB of memory to read a few records; "
    cases = {
        "text, gz": ({"kind": "text", "path": str(_packed("a.txt.gz", b"x"))}, too_long),
        "text, zst": ({"kind": "text", "path": str(_packed("a.txt.zst", b"x"))}, too_long),
        "jsonl, gz": ({"kind": "jsonl", "path": str(_packed("a.jsonl.gz", *record))}, too_long),
        "jsonl, zst": ({"kind": "jsonl", "path": str(_packed("a.jsonl.zst", *record))}, too_long),
        "json lines of datasets": (_hf("json", _packed("b.jsonl.gz", *record)), too_long),
        "json list": (_hf("json", _packed("a.json.gz", b"[", *record, b"]")), too_much),
        "csv": (_hf("csv", _packed("a.csv.gz", b"text\n", b"x", b"\n")), too_much),
        "text of datasets": (_hf("text", _packed("b.txt.gz", b"x")), too_much),
        "parquet, one text a thousand times": (_hf("parquet", _parquet_of_one_text()), too_much),
        "parquet, one record": (_hf("parquet", _parquet_of_one_row()), too_much),
        "arrow, one record": (_hf("arrow", _arrow("a.arrow", pa.table({"text": ["x" * BIG]}))), too_much),
        "arrow, one text a hundred times": (_hf("arrow", _arrow("b.arrow", _arrow_of_one_text())), too_much),
    }
    sources = {"good": _hf("parquet", Path("good.parquet"))} | {name: values for name, (values, _) in cases.items()}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(sources)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    results, more_kb = json.loads(result.stdout.splitlines()[-1])
    assert results.pop("good") == 5000
    for name, line in results.items():
        values, expected = cases[name]
        assert Path(values.get("data_files", values["path"])).name in line and expected in line, (name, line)
        assert "\n" not in line
    assert more_kb < 100 << 10
