from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.data import ingest as module
from trainer.data.config import SplitConfig
from trainer.data.ingest import DomainInfo, ingest
from trainer.data.shards import TokenFile, open_token_file
from trainer.data.sources.base import Document, Source
from trainer.data.tokenizers.byte import ByteTokenizer


class ListSource(Source):
    """Documents given as (domain, text)."""

    weight = 1.0

    def __init__(self, *documents: tuple[str, str]) -> None:
        self._documents = documents

    def files(self) -> list[Path]:
        return []

    def documents(self) -> Iterator[Document]:
        for domain, text in self._documents:
            yield Document(name=text, domain=domain, text=text)


class Reports:
    def __init__(self) -> None:
        self.all: list[tuple[int, int, str]] = []

    def update(self, done_bytes: int, total_bytes: int, label: str) -> None:
        self.all.append((done_bytes, total_bytes, label))


def run(
    folder: Path, *sources: Source, reports: Reports | None = None, fraction: float = 0.5, **split: Any
) -> list[DomainInfo]:
    return ingest(
        sources,
        folder,
        tokenizer=ByteTokenizer(),
        split=SplitConfig(fraction=fraction, **split),
        total_bytes=100,
        progress=reports,
    )


def text_of(folder: Path, info: DomainInfo, side: str) -> bytes:
    file: TokenFile = open_token_file(folder, f"{info.name}.{side}", getattr(info, side), vocab_size=256)
    return bytes(file.tokens)


def test_domains_are_listed_by_source_then_by_name(folder):
    domains = run(folder, ListSource(("z", "ab"), ("b", "ab")), ListSource(("a", "ab")))
    assert [(d.source, d.name) for d in domains] == [(0, "b"), (0, "z"), (1, "a")]


def test_each_domain_is_cut_by_itself(folder):
    one, two = run(folder, ListSource(("a", "ab"), ("b", "cdef")))
    assert (text_of(folder, one, "train"), text_of(folder, one, "validation")) == (b"a", b"b")
    assert (text_of(folder, two, "train"), text_of(folder, two, "validation")) == (b"cd", b"ef")


def test_the_tail_has_ends_between_documents_but_not_at_the_cut(folder):
    (domain,) = run(folder, ListSource(("a", "abc"), ("a", "defg"), ("a", "hi")), kind="tail")
    assert text_of(folder, domain, "train") == b"abc\xffd"
    assert text_of(folder, domain, "validation") == b"efg\xffhi"


def test_a_single_document_has_no_ends(folder):
    (domain,) = run(folder, ListSource(("a", "abcd")))
    assert (domain.train.num_tokens, domain.validation.num_tokens) == (2, 2)


def test_no_document_is_lost_by_the_hash(folder):
    texts = [f"text {i}" for i in range(40)]
    (domain,) = run(folder, ListSource(*[("a", text) for text in texts]))
    sides = [text_of(folder, domain, side).split(b"\xff") for side in ("train", "validation")]
    assert sorted(sides[0] + sides[1]) == sorted(text.encode() for text in texts)
    assert domain.train.num_documents + domain.validation.num_documents == 40


def test_bytes_are_those_of_the_text(folder):
    (domain,) = run(folder, ListSource(("a", "äb"), ("a", "ä")), kind="tail")
    assert domain.train.num_bytes + domain.validation.num_bytes == 5


def test_progress_ends_at_the_total_and_never_passes_it(folder, monkeypatch):
    monkeypatch.setattr(module, "_REPORT_BYTES", 60)
    reports = Reports()
    run(folder, ListSource(*[("a", f"{i:030d}") for i in range(10)]), reports=reports)
    assert reports.all == [(60, 100, "tokenising")] + [(100, 100, "tokenising")] * 5


def test_a_hash_that_holds_out_nothing_says_to_use_the_tail(folder, says):
    with says(
        "data.split: kind hash at fraction 0.001 leaves the validation side of domain a empty (documents: 2); both "
        "sides need one; use data.split.kind: tail"
    ):
        run(folder, ListSource(("a", "ab"), ("a", "cd")), kind="hash", fraction=0.001)


def test_a_hash_of_one_document_says_to_use_the_tail(folder, says):
    with says(
        "data.split: kind hash at fraction 0.999 leaves the train side of domain a empty (documents: 1); both sides "
        "need one; use data.split.kind: tail"
    ):
        run(folder, ListSource(("a", "ab")), kind="hash", fraction=0.999)


def test_a_text_too_short_to_cut_is_named(folder, says):
    with says(
        "data.split: domain a has too little text to hold out 0.5 of it; both sides need at least one character; give "
        "it more text"
    ):
        run(folder, ListSource(("a", "x")))


def test_two_sources_of_one_domain_are_refused(folder, says):
    with says(
        "data.sources: sources 0 and 1 both have domain a; a domain is of one source; give each its own `domain`"
    ):
        run(folder, ListSource(("a", "ab")), ListSource(("a", "cd")))


def test_a_source_without_documents_is_named(folder, says):
    with says("data.sources: source 1 holds no documents; it needs some; remove or correct it"):
        run(folder, ListSource(("a", "ab")), ListSource())


def test_too_many_domains_are_refused(folder, monkeypatch, says):
    monkeypatch.setattr(module, "MAX_DOMAINS", 2)
    with says(
        "data.sources: more than 2 domains; that is the limit; check that domain_key names a kind of text and not a "
        "single document"
    ):
        run(folder, ListSource(("a", "ab"), ("b", "ab"), ("c", "ab")))


@pytest.mark.parametrize("kind", ["auto", "hash"])
def test_documents_are_written_as_they_come(folder, kind):
    """At most one document waits, so that memory does not grow with the corpus."""
    written: list[int] = []

    class Watched(ListSource):
        def documents(self) -> Iterator[Document]:
            for number, document in enumerate(super().documents()):
                written.append(sum(path.stat().st_size for path in folder.glob("*.tokens")) - 100_000 * (number - 1))
                yield document

    run(folder, Watched(*[("a", f"{i:0100000d}") for i in range(12)]), kind=kind)
    assert min(written) >= 0
