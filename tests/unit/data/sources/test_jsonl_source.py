import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.data.records import json_lines
from trainer.data.sources.base import Document
from trainer.data.sources.registry import JsonlSourceConfig
from trainer.errors import DataError

WAY_ON = ", or skip it: on_bad_row: skip"


@pytest.fixture
def read(folder: Path) -> Callable[..., list[Document]]:
    """Write records.jsonl and read it as documents."""

    def read(content: str | bytes, **options: Any) -> list[Document]:
        (folder / "records.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(JsonlSourceConfig(path="records.jsonl", **options).build().documents())

    return read


def test_each_line_is_one_document_named_by_file_and_line(read):
    assert read('{"text": "a"}\n{"text": "b\\n"}') == [
        Document(name="records.jsonl:1", domain="jsonl", text="a"),
        Document(name="records.jsonl:2", domain="jsonl", text="b\n"),
    ]


def test_blank_lines_are_no_documents_but_count_as_lines(read):
    assert [d.name for d in read('\n{"text": "a"}\n \r\n{"text": "b"}\r\n')] == ["records.jsonl:2", "records.jsonl:4"]


def test_another_key_can_hold_the_text(read):
    assert read('{"body": "a", "text": 1}', text="{body}")[0].text == "a"


def test_the_domain_can_come_from_the_record(read):
    documents = read('{"text": "a", "lang": "de"}\n{"text": "b", "lang": "fr"}', domain_key="lang")
    assert [d.domain for d in documents] == ["de", "fr"]


def test_a_byte_order_mark_is_left_out(read):
    assert read(b'\xef\xbb\xbf{"text": "a"}')[0].text == "a"


def test_a_surrogate_pair_is_one_character(read):
    assert read('{"text": "\\ud83d\\ude00"}')[0].text == "\U0001f600"


def test_gzip_is_unpacked(folder):
    (folder / "records.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert [d.text for d in JsonlSourceConfig(path="*.gz").build().documents()] == ["a"]


def test_a_truncated_gzip_is_named(folder, fails):
    (folder / "records.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n')[:-9])
    with fails(
        "records.jsonl.gz: damaged gzip data (Compressed file ended before the end-of-stream marker was reached); copy "
        "or compress the file again"
    ):
        list(JsonlSourceConfig(path="records.jsonl.gz").build().documents())


def test_text_is_a_string_and_nothing_else(read, fails):
    for value, kind in [
        ("null", "null"),
        ("3", "a number"),
        ("true", "a boolean"),
        ("[]", "a list"),
        ("{}", "an object"),
    ]:
        with fails(f"records.jsonl:2: 'text' is {kind}; it must be a string; correct or remove the record" + WAY_ON):
            read('{"text": "a"}\n{"text": ' + value + "}")


def test_a_missing_key_is_named_with_the_keys_there_are(read, fails):
    with fails(
        "records.jsonl:1: no column 'text'; the record has id, txet (did you mean 'txet'?); correct the name or the "
        "record" + WAY_ON
    ):
        read('{"id": 1, "txet": "a"}')


def test_a_missing_domain_is_named(read, fails):
    with fails("records.jsonl:1: no column 'lang'; the record has text; correct the name or the record" + WAY_ON):
        read('{"text": "a"}', domain_key="lang")


def test_an_empty_object_has_no_keys(read, fails):
    with fails("records.jsonl:1: no column 'text'; the record has no columns; correct the name or the record" + WAY_ON):
        read("{}")


def test_an_invalid_domain_name_is_refused(read, fails):
    with fails(
        "records.jsonl:1: domain 'a/b' is not a valid name; names are 1 to 64 letters, digits, dots, dashes and "
        "underscores; correct the record or set another domain_key" + WAY_ON
    ):
        read('{"text": "a", "lang": "a/b"}', domain_key="lang")


def test_a_record_without_text_is_refused(read, fails):
    with fails(
        "records.jsonl:1: '{text}' holds no text (empty or only white space); every record needs some; remove it"
        + WAY_ON
    ):
        read('{"text": " \\n"}')


def test_a_record_that_is_not_an_object_is_refused(read, fails):
    for record, kind in [('["a"]', "a list"), ('"a"', "a string"), ("null", "null"), ("1.5", "a number")]:
        with fails(f"records.jsonl:1: the record is {kind}; every record is an object; correct or remove it" + WAY_ON):
            read(record)


def test_a_line_that_is_not_json_is_named_with_the_reason(read, fails):
    with fails(
        "records.jsonl:2: not JSON (Expecting ',' delimiter at column 14); every line is one JSON object; correct or "
        "remove it" + WAY_ON
    ):
        read('{"text": "a"}\n{"text": "b" "c"}')


@pytest.mark.parametrize("record", ['{"text": ' + "[" * 100_000, '{"text": ' + "9" * 5000 + "}"])
def test_json_that_python_refuses_is_named(read, record):
    with pytest.raises(DataError, match=r"^records\.jsonl:1: not JSON \(.+\); every line is one JSON object;"):
        read(record)


def test_a_lone_surrogate_is_refused(read, fails):
    with fails(
        "records.jsonl:1: 'text' has the lone surrogate \\ud83d at character 1; text must be valid Unicode; correct or "
        "remove the record" + WAY_ON
    ):
        read('{"text": "a\\ud83d"}')


def test_a_byte_that_is_not_utf8_is_named_with_its_place_in_the_file(read, fails):
    with fails(
        "records.jsonl:2: byte 0xe9 at offset 24 is not UTF-8; text is read as UTF-8; convert the file (iconv -t UTF-8)"
        + WAY_ON
    ):
        read(b'{"text": "a"}\n{"text": "\xe9"}')


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_records_is_named(read, fails, content):
    with fails(
        "records.jsonl: holds no records (empty or only white space); every file needs some; remove it" + WAY_ON
    ):
        read(content)


def test_a_record_over_the_limit_is_named(read, monkeypatch, fails):
    monkeypatch.setattr(json_lines, "MAX_RECORD_BYTES", 20)
    with fails("records.jsonl:2: more than 20 bytes in one record; that is the limit; split the record" + WAY_ON):
        read('{"text": "a"}\n' + json.dumps({"text": "a" * 20}))


def test_a_large_file_is_split_at_line_ends_and_keeps_line_numbers(folder, monkeypatch):
    monkeypatch.setattr(json_lines, "_PART_BYTES", 60)
    monkeypatch.setattr(json_lines, "_CHUNK_BYTES", 7)
    lines = [json.dumps({"text": f"text {i}" * (i % 3 + 1)}) if i % 4 else "" for i in range(40)]
    (folder / "records.jsonl").write_text("\n".join(lines))
    source = JsonlSourceConfig(path="records.jsonl").build()
    parts = source.parts()
    assert len(parts) > 5
    assert sum(part.size_bytes for part in parts) == (folder / "records.jsonl").stat().st_size
    numbers = [document.name for part in parts for document in source.read(part)]
    assert numbers == [f"records.jsonl:{i + 1}" for i, line in enumerate(lines) if line]
