import errno
import fcntl
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import corpus as module
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.sources.registry import TextSourceConfig
from trainer.data.token_cache import read_tasks, source_cache
from trainer.data.token_cache.cache_folder import build_lock
from trainer.data.token_cache.input_files import FileState
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.errors import DataError, ResourceError


@pytest.fixture
def config(folder: Path) -> DataConfig:
    (folder / "a.txt").write_text("abcdefgh")
    (folder / "b.txt").write_text("ijklmnop")
    split = SplitConfig(kind="tail", fraction=0.5)
    return DataConfig(sources=[TextSourceConfig(path="*.txt")], split=split, cache_dir="cache")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every build."""
    made: list[str] = []
    ingest = read_tasks.ingest

    def counting(*args: Any, **options: Any) -> object:
        made.append("built")
        return ingest(*args, **options)

    monkeypatch.setattr(read_tasks, "ingest", counting)
    return made


def all_text(corpus: Corpus) -> bytes:
    return bytes(corpus.train[0].tokens[:]) + b"|" + bytes(corpus.validation[0].tokens[:])


def in_cache(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir() if path.suffix not in (".lock", ".parts"))


def in_threads(number: int, work: Callable[[], Corpus]) -> list[Corpus]:
    done: list[Corpus] = []
    threads = [threading.Thread(target=lambda: done.append(work())) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def test_a_second_run_reads_no_file(config, builds, monkeypatch):
    first = build_corpus(config)
    monkeypatch.setattr(FileState, "hashed", lambda state: pytest.fail("read a file"))
    second = build_corpus(config)
    assert builds == ["built"]
    assert second.fingerprint == first.fingerprint
    assert all_text(second) == all_text(first) == b"abcdefgh|ijklmnop"


def test_a_touched_file_is_read_once_and_not_built_again(config, builds, folder, monkeypatch):
    build_corpus(config)
    os.utime(folder / "a.txt", ns=(1, 1))
    build_corpus(config)
    assert builds == ["built"]
    monkeypatch.setattr(FileState, "hashed", lambda state: pytest.fail("did not remember the new time"))
    build_corpus(config)


def test_a_renamed_file_of_the_same_content_is_not_built_again(config, builds, folder):
    build_corpus(config)
    (folder / "a.txt").rename(folder / "a2.txt")
    build_corpus(config)
    assert builds == ["built"]


def test_changed_content_of_the_same_size_is_built_again(config, builds, folder):
    first = build_corpus(config)
    (folder / "a.txt").write_text("ABCDEFGH")
    os.utime(folder / "a.txt", ns=(1, 1))  # the clock may be too coarse for a new time
    second = build_corpus(config)
    assert builds == ["built", "built"]
    assert all_text(second) == b"ABCDEFGH|ijklmnop"
    assert second.fingerprint != first.fingerprint
    assert all_text(first) == b"abcdefgh|ijklmnop"  # open files stay readable


def test_a_new_match_of_a_glob_is_built_in(config, builds, folder):
    build_corpus(config)
    (folder / "c.txt").write_text("qrst")
    assert all_text(build_corpus(config)) == b"abcdefgh\xffij|klmnop\xffqrst"
    assert builds == ["built", "built"]


@pytest.mark.parametrize("name", ["text.train.tokens", "text.validation.documents", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_cache_is_built_again_with_a_message(config, builds, caplog, name, damage):
    file = build_corpus(config).folders[0] / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        corpus = build_corpus(config)
    assert all_text(corpus) == b"abcdefgh|ijklmnop"
    assert builds == ["built", "built"]
    assert caplog.messages == [f"{corpus.folders[0]}: the token cache is damaged; building it again"]


def flip(file: Path, at: int) -> None:
    """Change a bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["text.train.tokens", "text.validation.documents", "text.train.answers"])
def test_a_flipped_bit_is_an_error_that_names_the_file(config, builds, fails, name):
    folder = build_corpus(config).folders[0]
    flip(folder / name, 3)
    with fails(
        f"{folder / name}: its content is not what was written (the checksum differs); disk or memory has corrupted "
        f"it; remove {folder}, and it is built again from the text"
    ):
        build_corpus(config)
    assert builds == ["built"]


def test_a_large_text_is_compared_where_it_is_read(config, folder, fails):
    (folder / "a.txt").write_text("abcdefgh" * 40_000)
    corpus = build_corpus(config)
    flip(corpus.folders[0] / "text.train.tokens", 70_000)
    tokens = build_corpus(config).train[0].tokens
    assert tokens[: 1 << 16].tobytes() == b"abcdefgh" * (1 << 13)
    assert tokens[np.array([[0, 140_000]])].tobytes() == b"aa"
    with fails(
        f"{corpus.folders[0] / 'text.train.tokens'}: bytes 65536 to 131071 are not what was written (the checksum "
        f"differs); disk or memory has corrupted it; remove {corpus.folders[0]}, and it is built again from the text"
    ):
        tokens[np.array([[0, 100_000]])]


@pytest.mark.parametrize("length", [8, 40_000])
def test_a_cache_of_an_older_version_is_used_and_verified_when_opened(config, builds, folder, length):
    (folder / "a.txt").write_text("abcdefgh" * length)
    corpus = build_corpus(config)
    manifest = corpus.folders[0] / "manifest.json"
    manifest.write_text(re.sub(r',\s*"(checksums_sha256|record_sha256)": [^,\s}]+', "", manifest.read_text()))
    for file in corpus.folders[0].glob("*.checksums"):
        file.unlink()
    again = build_corpus(config)
    assert builds == ["built"]
    assert (again.fingerprint, all_text(again)) == (corpus.fingerprint, all_text(corpus))
    flip(corpus.folders[0] / "text.train.tokens", 8 * length // 2)
    with pytest.raises(DataError, match=r"text\.train\.tokens: its content is not what was written"):
        build_corpus(config)


def test_the_cache_of_another_source_is_not_used(config, builds, caplog):
    mine = build_corpus(config)
    other = build_corpus(config.model_copy(update={"split": SplitConfig(kind="tail", fraction=0.25)}))
    for file in other.folders[0].iterdir():
        (mine.folders[0] / file.name).write_bytes(file.read_bytes())
    assert all_text(build_corpus(config)) == b"abcdefgh|ijklmnop"
    assert caplog.messages == [f"{mine.folders[0]}: the token cache is damaged; building it again"]


def test_a_failed_build_leaves_nothing_that_looks_finished(config, folder, monkeypatch):
    encode = ByteTokenizer.encode

    def fail_late(self: ByteTokenizer, text: str) -> object:
        if text.startswith("i"):
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", fail_late)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config)
    assert all(name.startswith(".") for name in in_cache(folder))
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert all_text(build_corpus(config)) == b"abcdefgh|ijklmnop"


def test_leftovers_of_a_killed_build_are_removed_by_the_next(config, folder):
    corpus = build_corpus(config)
    left = folder / "cache" / f".{corpus.folders[0].name}.killed"
    corpus.folders[0].rename(left)
    (left / "manifest.json").unlink()
    assert all_text(build_corpus(config)) == b"abcdefgh|ijklmnop"
    assert in_cache(folder) == [corpus.folders[0].name]


def test_a_kill_before_the_rename_leaves_nothing_of_that_name(config, folder, monkeypatch):
    monkeypatch.setattr(source_cache, "publish", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config)
    assert all(name.startswith(".") for name in in_cache(folder))
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    corpus = build_corpus(config)
    assert in_cache(folder) == [corpus.folders[0].name]


def test_several_processes_build_once(config, builds, folder):
    corpora = in_threads(4, lambda: build_corpus(config))
    assert [all_text(corpus) for corpus in corpora] == [b"abcdefgh|ijklmnop"] * 4
    assert builds == ["built"]
    assert in_cache(folder) == [corpora[0].folders[0].name]


def test_without_locks_the_last_rename_wins(config, folder, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    corpora = in_threads(4, lambda: build_corpus(config))
    assert [all_text(corpus) for corpus in corpora] == [b"abcdefgh|ijklmnop"] * 4
    assert in_cache(folder) == [corpora[0].folders[0].name]


def test_a_cache_that_keeps_being_replaced_is_named(config, monkeypatch, fails):
    build_corpus(config)
    monkeypatch.setattr(module, "_open", lambda *args: (_ for _ in ()).throw(FileNotFoundError()))
    with fails(
        "data.cache_dir: cache: other runs keep replacing its content; a text must not change during training; "
        "stop what changes it, or give this run a cache_dir of its own"
    ):
        build_corpus(config)


def test_a_folder_replaced_while_it_is_opened_is_opened_again(config, folder, monkeypatch):
    build_corpus(config)
    opened = module._open

    def replaced_first(*args: Any) -> Corpus:
        monkeypatch.setattr(module, "_open", opened)
        corpus = opened(*args)
        (folder / "a.txt").write_text("ABCD")
        build_corpus(config)
        return corpus

    monkeypatch.setattr(module, "_open", replaced_first)
    assert all_text(build_corpus(config)) == b"ABCD\xffij|klmnop"


def test_waiting_for_another_process_is_reported(config, folder):
    build_corpus(config)
    corpus = build_corpus(config)
    (corpus.folders[0] / "manifest.json").unlink()
    is_waiting, free = threading.Event(), threading.Event()
    labels: list[str] = []

    class Reports:
        def update(self, done_bytes: int, total_bytes: int, label: str) -> None:
            labels.append(label)
            is_waiting.set()

    def hold() -> None:
        with build_lock(corpus.folders[0], waiting=lambda: None):
            free.set()
            is_waiting.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    free.wait(10)
    build_corpus(config, progress=Reports())
    holder.join()
    assert labels == ["waiting for another process that reads this text", "tokenising"]


def test_a_file_that_changes_while_it_is_read_is_named(config, folder, monkeypatch, fails):
    ingest = read_tasks.ingest

    def meddling(*args: Any, **options: Any) -> object:
        (folder / "b.txt").write_text("shorter")
        return ingest(*args, **options)

    monkeypatch.setattr(read_tasks, "ingest", meddling)
    with fails("b.txt: changed during reading; files must not change meanwhile; start again"):
        build_corpus(config)
    assert all(name.startswith(".") for name in in_cache(folder))


def test_a_cache_that_cannot_be_written_is_named(config, folder):
    (folder / "cache").write_text("a file")
    with pytest.raises(DataError) as error:
        build_corpus(config)
    assert str(error.value) == (
        "data.cache_dir: cache: cannot be written (File exists); it holds the tokenised text; set a folder that this "
        "user can write to"
    )


def test_a_full_disk_is_named(config, folder, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(read_tasks, "ingest", full)
    with pytest.raises(ResourceError) as error:
        build_corpus(config)
    assert str(error.value) == (
        "data.cache_dir: cache: the disk is full (No space left on device); tokens take about as much space as the "
        "text; free some or set another folder"
    )
    assert all(name.startswith(".") for name in in_cache(folder))
