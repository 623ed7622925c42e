from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.data.config import SplitConfig
from trainer.data.sources.base import Document
from trainer.data.token_cache import ingest as module
from trainer.data.token_cache.ingest import DomainInfo, check_sides, count_characters, ingest
from trainer.data.token_cache.token_files import TokenFile, open_token_file
from trainer.data.tokenizers.byte import ByteTokenizer


def documents(*given: tuple[str, str]) -> Iterator[Document]:
    """Yield documents given as (domain, text)."""
    for domain, text in given:
        yield Document(name=text, domain=domain, text=text)


def run(folder: Path, *given: tuple[str, str], fraction: float = 0.5, **options: Any) -> list[DomainInfo]:
    split = SplitConfig(fraction=fraction, **options)
    lengths = count_characters(documents(*given)) if split.kind == "tail" else None
    domains = ingest(
        documents(*given), folder, tokenizer=ByteTokenizer(), split=split, advance=lambda done: None, lengths=lengths
    )
    for domain in domains:
        check_sides(domain, split)
    return domains


def text_of(folder: Path, info: DomainInfo, side: str) -> bytes:
    file: TokenFile = open_token_file(folder, f"{info.name}.{side}", getattr(info, side), vocab_size=256)
    return bytes(file.tokens[:])


def test_domains_are_listed_by_name(folder):
    assert [domain.name for domain in run(folder, ("z", "ab"), ("b", "ab"))] == ["b", "z"]


def test_each_domain_is_split_separately(folder):
    one, two = run(folder, ("a", "ab"), ("b", "cdef"))
    assert (text_of(folder, one, "train"), text_of(folder, one, "validation")) == (b"a", b"b")
    assert (text_of(folder, two, "train"), text_of(folder, two, "validation")) == (b"cd", b"ef")


def test_the_tail_has_ends_between_documents_but_not_at_the_cut(folder):
    (domain,) = run(folder, ("a", "abc"), ("a", "defg"), ("a", "hi"), kind="tail")
    assert text_of(folder, domain, "train") == b"abc\xffd"
    assert text_of(folder, domain, "validation") == b"efg\xffhi"


def test_a_single_document_has_no_ends(folder):
    (domain,) = run(folder, ("a", "abcd"))
    assert (domain.train.num_tokens, domain.validation.num_tokens) == (2, 2)


def test_no_document_is_lost_by_the_hash(folder):
    texts = [f"text {i}" for i in range(40)]
    (domain,) = run(folder, *[("a", text) for text in texts])
    sides = [text_of(folder, domain, side).split(b"\xff") for side in ("train", "validation")]
    assert sorted(sides[0] + sides[1]) == sorted(text.encode() for text in texts)
    assert domain.train.num_documents + domain.validation.num_documents == 40


def test_bytes_are_those_of_the_text(folder):
    (domain,) = run(folder, ("a", "äb"), ("a", "ä"), kind="tail")
    assert domain.train.num_bytes + domain.validation.num_bytes == 5


def test_progress_is_reported_after_every_document(folder):
    reported: list[int] = []
    given = documents(*[("a", f"{i:030d}") for i in range(3)], ("b", "ä"))
    ingest(given, folder, tokenizer=ByteTokenizer(), split=SplitConfig(kind="hash"), advance=reported.append)
    assert reported == [30, 30, 30, 2]


def test_the_error_for_a_hash_that_holds_out_nothing_suggests_the_tail(folder, fails):
    with fails(
        "data.split: kind hash at fraction 0.001 leaves the validation side of domain a empty (documents: 2); both "
        "sides need one; use data.split.kind: tail"
    ):
        run(folder, ("a", "ab"), ("a", "cd"), kind="hash", fraction=0.001)


def test_the_error_for_a_hash_of_one_document_suggests_the_tail(folder, fails):
    with fails(
        "data.split: kind hash at fraction 0.999 leaves the train side of domain a empty (documents: 1); both sides "
        "need one; use data.split.kind: tail"
    ):
        run(folder, ("a", "ab"), kind="hash", fraction=0.999)


def test_a_text_too_short_to_split_is_named(folder, fails):
    with fails(
        "data.split: domain a has too little text to hold out 0.5 of it; both sides need at least one character; give "
        "it more text"
    ):
        run(folder, ("a", "x"))


def test_too_many_domains_are_refused(folder, monkeypatch, fails):
    monkeypatch.setattr(module, "MAX_DOMAINS", 2)
    with fails(
        "data.sources: more than 2 domains in one source; that is the limit; check that domain_key names a kind of "
        "text and not a single document"
    ):
        run(folder, ("a", "ab"), ("b", "ab"), ("c", "ab"))


@pytest.mark.parametrize("kind", ["auto", "hash"])
def test_documents_are_written_as_they_come(folder, kind):
    """At most one document is buffered, so memory does not grow with the corpus."""
    written: list[int] = []

    def watched() -> Iterator[Document]:
        for number, document in enumerate(documents(*[("a", f"{i:0100000d}") for i in range(12)])):
            written.append(sum(path.stat().st_size for path in folder.glob("*.tokens")) - 100_000 * (number - 1))
            yield document

    ingest(watched(), folder, tokenizer=ByteTokenizer(), split=SplitConfig(kind=kind), advance=lambda done: None)
    assert min(written) >= 0
