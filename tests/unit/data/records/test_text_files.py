import gzip
from pathlib import Path

import pytest

from trainer.data.records import text_files
from trainer.data.records.text_files import read_document
from trainer.errors import DataError


def test_carriage_returns_are_kept(folder):
    (folder / "a.txt").write_bytes(b"a\r\nb\n")
    assert read_document(Path("a.txt")) == "a\r\nb\n"


def test_a_byte_order_mark_is_left_out(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read_document(Path("a.txt")) == "a"


def test_a_mark_inside_the_text_is_kept(folder):
    (folder / "a.txt").write_text("a\ufeffb", encoding="utf-8")
    assert read_document(Path("a.txt")) == "a\ufeffb"


def test_nul_is_text(folder):
    (folder / "a.txt").write_bytes(b"a\0b")
    assert read_document(Path("a.txt")) == "a\0b"


def test_gzip_is_unpacked(folder):
    (folder / "a.txt.gz").write_bytes(gzip.compress("schön".encode()))
    assert read_document(Path("a.txt.gz")) == "schön"


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_named(folder, fails, content):
    (folder / "a.txt").write_bytes(content)
    with fails("a.txt: holds no text (empty or only white space); every file needs some; remove it"):
        read_document(Path("a.txt"))


def test_a_byte_that_is_not_utf8_is_named_with_its_line(folder, fails):
    (folder / "a.txt").write_bytes(b"one\ntwo\nth\xe9")
    with fails(
        "a.txt:3: byte 0xe9 at offset 10 is not UTF-8; text is read as UTF-8; convert the file (iconv -t UTF-8)"
    ):
        read_document(Path("a.txt"))


def test_a_truncated_gzip_is_named(folder, fails):
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"abc" * 100)[:-9])
    with fails(
        "a.txt.gz: damaged gzip data (Compressed file ended before the end-of-stream marker was reached); copy or "
        "compress the file again"
    ):
        read_document(Path("a.txt.gz"))


@pytest.mark.parametrize("damage", [0, 12, -6])  # the header, the data, the checksum
def test_a_damaged_gzip_is_named(folder, damage):
    content = bytearray(gzip.compress(b"abc" * 100))
    content[damage] ^= 0xFF
    (folder / "a.txt.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"^a\.txt\.gz: damaged gzip data \(.+\); copy or compress"):
        read_document(Path("a.txt.gz"))


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch, fails):
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with fails("a.txt: cannot be read (Permission denied); make it readable for this user"):
        read_document(Path("a.txt"))


def test_a_document_over_the_limit_is_named(folder, monkeypatch, fails):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 3)
    (folder / "a.txt").write_text("abcd")
    with fails("a.txt: more than 3 bytes in one document; that is the limit; split the file"):
        read_document(Path("a.txt"))
