import gzip
from pathlib import Path

import pytest

from trainer.data.sources import files
from trainer.data.sources.files import find_files, read_text


def test_a_path_is_found(folder):
    (folder / "a.txt").write_text("a")
    assert find_files("a.txt") == [Path("a.txt")]


def test_matches_of_a_glob_are_sorted(folder):
    for name in ("b.txt", "a.txt", "c.md"):
        (folder / name).write_text("x")
    assert find_files("*.txt") == [Path("a.txt"), Path("b.txt")]


def test_two_stars_stand_for_any_number_of_folders(folder):
    (folder / "x" / "y").mkdir(parents=True)
    for name in ("a.txt", "x/b.txt", "x/y/c.txt"):
        (folder / name).write_text("x")
    assert find_files("**/*.txt") == [Path("a.txt"), Path("x/b.txt"), Path("x/y/c.txt")]


def test_patterns_keep_their_order_and_name_each_file_once(folder):
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("x")
    assert find_files(["b.txt", "*.txt"]) == [Path("b.txt"), Path("a.txt")]


def test_a_file_with_brackets_in_its_name_is_found(folder):
    (folder / "a[1].txt").write_text("x")
    assert find_files("a[1].txt") == [Path("a[1].txt")]


def test_an_absolute_glob_works(folder):
    (folder / "a.txt").write_text("x")
    assert find_files(str(folder / "*.txt")) == [folder / "a.txt"]


def test_a_missing_file_is_named(folder, says):
    with says(f"a.txt: no such file; paths are relative to {folder}; correct the path"):
        find_files("a.txt")


def test_a_glob_without_a_match_is_named(folder, says):
    (folder / "x.txt").mkdir()
    with says(f"*.txt: the glob matches no file; globs are relative to {folder}; correct the glob"):
        find_files("*.txt")


def test_a_folder_is_refused(folder, says):
    (folder / "x").mkdir()
    with says("x: is a folder; a file or a glob is needed; use x/**/*.txt"):
        find_files("x")


def test_a_broken_link_is_not_passed_over(folder, says):
    (folder / "a.txt").symlink_to("nowhere")
    with says("a.txt: matched by *.txt, but it is no file (a broken link?); remove it"):
        find_files("*.txt")


def test_a_folder_that_may_not_be_read_is_named(folder, monkeypatch, says):
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with says("x/a.txt: cannot be read (Permission denied); make it readable for this user"):
        find_files("x/a.txt")


def test_carriage_returns_are_kept(folder):
    (folder / "a.txt").write_bytes(b"a\r\nb\n")
    assert read_text(Path("a.txt")) == "a\r\nb\n"


def test_a_byte_order_mark_is_left_out(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read_text(Path("a.txt")) == "a"


def test_a_mark_inside_the_text_is_kept(folder):
    (folder / "a.txt").write_text("a\ufeffb", encoding="utf-8")
    assert read_text(Path("a.txt")) == "a\ufeffb"


def test_nul_is_text(folder):
    (folder / "a.txt").write_bytes(b"a\0b")
    assert read_text(Path("a.txt")) == "a\0b"


def test_gzip_is_unpacked(folder):
    (folder / "a.txt.gz").write_bytes(gzip.compress("schön".encode()))
    assert read_text(Path("a.txt.gz")) == "schön"


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_named(folder, says, content):
    (folder / "a.txt").write_bytes(content)
    with says("a.txt: holds no text (empty or only white space); every file needs some; remove it"):
        read_text(Path("a.txt"))


def test_a_byte_that_is_not_utf8_is_named_with_its_line(folder, says):
    (folder / "a.txt").write_bytes(b"one\ntwo\nth\xe9")
    with says("a.txt:3: byte 0xe9 at offset 10 is not UTF-8; text is read as UTF-8; convert the file (iconv -t UTF-8)"):
        read_text(Path("a.txt"))


def test_a_truncated_gzip_is_named(folder, says):
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"abc" * 100)[:-9])
    with says(
        "a.txt.gz: damaged gzip data (Compressed file ended before the end-of-stream marker was reached); copy or "
        "compress the file again"
    ):
        read_text(Path("a.txt.gz"))


@pytest.mark.parametrize("damage", [0, 12, -6])  # the header, the data, the checksum
def test_a_damaged_gzip_is_named(folder, damage):
    content = bytearray(gzip.compress(b"abc" * 100))
    content[damage] ^= 0xFF
    (folder / "a.txt.gz").write_bytes(content)
    with pytest.raises(files.DataError, match=r"^a\.txt\.gz: damaged gzip data \(.+\); copy or compress"):
        read_text(Path("a.txt.gz"))


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch, says):
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with says("a.txt: cannot be read (Permission denied); make it readable for this user"):
        read_text(Path("a.txt"))


def test_a_document_over_the_limit_is_named(folder, monkeypatch, says):
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 3)
    (folder / "a.txt").write_text("abcd")
    with says("a.txt: more than 3 bytes in one document; that is the limit; split the file"):
        read_text(Path("a.txt"))
