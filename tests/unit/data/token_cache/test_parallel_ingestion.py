"""Parallel ingestion: each part once, by processes that may be killed, with the same result as one process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.records import json_lines
from trainer.data.sources.registry import HfSourceConfig, JsonlSourceConfig, SourceConfig, TextSourceConfig
from trainer.data.token_cache import read_tasks, workers
from trainer.errors import DataError, ResourceError

KINDS = ["text", "jsonl", "hf"]


def texts(number: int) -> list[str]:
    return [f"document {i}: " + "some words " * (i % 7 + 1) for i in range(number)]


def source(folder: Path, kind: str, number: int = 120) -> SourceConfig:
    """Write documents to several files of similar size; return a source that reads them."""
    documents = texts(number)
    for index in range(6):
        rows = [json.dumps({"text": text, "of": f"d{i % 2}"}) for i, text in enumerate(documents) if i % 6 == index]
        (folder / f"{index}.jsonl").write_text("\n".join(rows) + "\n")
    for index, text in enumerate(documents):
        (folder / f"{index:03d}.txt").write_text(text)
    if kind == "text":
        return TextSourceConfig(path="*.txt", domain="t")
    if kind == "jsonl":
        return JsonlSourceConfig(path="*.jsonl", domain_key="of")
    return HfSourceConfig(path="json", data_files="*.jsonl", domain_key="of")


def data(*sources: SourceConfig, cache: str = "cache", **options: Any) -> DataConfig:
    return DataConfig(sources=list(sources), split=SplitConfig(fraction=0.3), cache_dir=cache, **options)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_PART_BYTES", 500)
    monkeypatch.setattr(json_lines, "_CHUNK_BYTES", 100)
    monkeypatch.setattr("trainer.data.sources.text._PART_BYTES", 500)
    monkeypatch.setattr(workers, "_MIN_PROCESS_BYTES", 1000)


def content(corpus: Corpus) -> list[tuple[str, bytes, list[int], bytes, list[int]]]:
    return [
        (
            name,
            bytes(corpus.train[i].tokens[:]),
            corpus.train[i].document_starts.tolist(),
            bytes(corpus.validation[i].tokens[:]),
            corpus.validation[i].document_starts.tolist(),
        )
        for i, name in enumerate(corpus.domains)
    ]


def documents_of(corpus: Corpus) -> list[str]:
    files = [*corpus.train, *corpus.validation]
    return sorted(text.decode() for file in files for text in bytes(file.tokens[:]).split(b"\xff"))


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_processes_makes_the_same_tokens_of_every_document_once(folder, kind):
    one, two = (build_corpus(data(source(folder, kind), cache=f"c{n}", workers=n)) for n in (1, 2))
    assert content(one) == content(two)
    assert one.fingerprint == two.fingerprint
    assert documents_of(one) == sorted(texts(120))


@pytest.mark.parametrize("number", [1, 2])
def test_ingestion_in_parts_gives_the_same_tokens(folder, monkeypatch, number):
    in_parts = build_corpus(data(source(folder, "jsonl"), cache="parts", workers=number))
    monkeypatch.setattr(json_lines, "_PART_BYTES", 1 << 20)
    assert content(in_parts) == content(build_corpus(data(source(folder, "jsonl"), cache="whole")))


def test_the_only_document_of_a_domain_is_split_in_any_part(folder):
    (folder / "a.jsonl").write_text('{"text": "abcdefghij", "of": "one"}\n{"text": "x", "of": "two"}\n')
    (folder / "b.jsonl").write_text("".join(f'{{"text": "{i}", "of": "two"}}\n' for i in range(40)))
    corpus = build_corpus(data(JsonlSourceConfig(path="*.jsonl", domain_key="of")))
    assert corpus.domains == ("one", "two")
    assert (bytes(corpus.train[0].tokens[:]), bytes(corpus.validation[0].tokens[:])) == (b"abcdefg", b"hij")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_finished_parts_survive_a_failure(folder, monkeypatch, kind):
    config = data(source(folder, kind), workers=1)
    run, done = read_tasks.ReadTask.run, []

    def counted(self: read_tasks.ReadTask, tokenizer: Any, advance: Callable[[int], None]) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        run(self, tokenizer, advance)
        done.append(self.folder.name)

    monkeypatch.setattr(read_tasks.ReadTask, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config)
    first, done[:] = list(done), []
    monkeypatch.setattr(
        read_tasks.ReadTask, "run", lambda self, *args: (done.append(self.folder.name), run(self, *args))[1]
    )
    corpus = build_corpus(config)
    assert len(first) == 3
    assert not set(first) & set(done)
    assert documents_of(corpus) == sorted(texts(120))
    assert not list(folder.glob("cache/*.parts"))


@pytest.mark.parametrize("name", ["d0.train.tokens", "d1.validation.documents", "part.json"])
def test_a_part_that_has_changed_since_it_was_made_is_made_again(folder, monkeypatch, name):
    config = data(source(folder, "jsonl"), workers=1)
    expected = content(build_corpus(data(*config.sources, cache="sound")))
    with monkeypatch.context() as context:
        context.setattr(
            "trainer.data.token_cache.source_cache.join_parts",
            lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt()),
        )
        with pytest.raises(KeyboardInterrupt):
            build_corpus(config)
    file = sorted(folder.glob(f"cache/*.parts/part-*/{name}"))[0]
    file.write_bytes(file.read_bytes().replace(b"1", b"3") if name == "part.json" else bytes(file.stat().st_size))
    assert content(build_corpus(config)) == expected


def test_parts_of_other_files_are_not_used(folder, monkeypatch):
    config = data(source(folder, "jsonl"), workers=1)
    finish = "trainer.data.token_cache.source_cache.join_parts"
    with monkeypatch.context() as context:
        context.setattr(finish, lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build_corpus(config)
    assert list(folder.glob("cache/*.parts/part-*"))
    (folder / "0.jsonl").write_text('{"text": "new", "of": "d0"}\n')
    assert "new" in documents_of(build_corpus(config))


def test_the_error_of_a_process_is_raised_here(folder):
    config = data(source(folder, "jsonl"), workers=2)
    with (folder / "4.jsonl").open("a") as file:
        file.write('{"txt": "a"}\n')
    with pytest.raises(DataError, match=r"^4\.jsonl:21: no column 'text'; the record has txt \(did you mean 'txt'\?\)"):
        build_corpus(config)


def _die(self: read_tasks.ReadTask, tokenizer: object, advance: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_named_and_finished_parts_are_kept(folder, monkeypatch):
    config = data(source(folder, "jsonl"), workers=2)
    monkeypatch.setattr(read_tasks.ReadTask, "run", _die)
    started = workers.multiprocessing.get_context("fork")  # hands the patched class to the processes
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: started)
    with pytest.raises(
        ResourceError, match=r"^data: a process that read text was killed by SIGKILL; was it out of memory"
    ):
        build_corpus(config)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert documents_of(build_corpus(config)) == sorted(texts(120))


def test_processes_end_with_the_one_that_started_them(folder):
    source(folder, "jsonl")
    os.mkfifo(folder / "0.pipe")
    os.mkfifo(folder / "1.pipe")
    script = (
        "from trainer.data.token_cache import workers\n"
        "from trainer.data.token_cache.read_tasks import ReadTask\n"
        "from trainer.data.token_cache.splits import SplitConfig\n"
        "from trainer.data.records.json_lines import LineRange\n"
        "from trainer.data.sources.registry import JsonlSourceConfig\n"
        "from trainer.data.tokenizers.byte import ByteTokenizer\n"
        "from pathlib import Path\n"
        "parts = [LineRange(size_bytes=1 << 30, path=Path(f'{i}.pipe'), start_byte=0, first_line=1) for i in (0, 1)]\n"
        "todo = [ReadTask(source=JsonlSourceConfig(path='0.jsonl'), part=part, split=SplitConfig(kind='hash'),\n"
        "                   folder=Path(f'p{i}')) for i, part in enumerate(parts)]\n"
        "workers.run_tasks(todo, ByteTokenizer(), 2, print)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    )
    children = _wait_for(lambda: children if len(children := _children(process.pid)) >= 2 else None)
    process.kill()
    process.wait()
    _wait_for(lambda: all(not _is_running(child) for child in children) or None)


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (value := condition()) is not None:
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_a_copy_of_a_file_is_named(folder):
    config = data(source(folder, "jsonl"))
    (folder / "9.jsonl").write_bytes((folder / "2.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"^9\.jsonl: is a copy of 2\.jsonl; each record is read once; remove one"):
        build_corpus(config)


def test_hundreds_of_sources_are_a_mixture(folder):
    for index in range(300):
        (folder / f"{index}.txt").write_text(f"text number {index} " * 20)
    config = data(*(TextSourceConfig(path=f"{i}.txt", domain=f"d{i}") for i in range(300)), workers=1)
    assert len(build_corpus(config).domains) == 300
