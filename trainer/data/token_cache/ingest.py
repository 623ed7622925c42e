"""Tokenise documents into token files, one document at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from trainer.data.records.bad_records import SkippedRecords
from trainer.data.sources.base import Document
from trainer.data.token_cache.domain_files import SIDES, DomainInfo, write_document, write_sides
from trainer.data.token_cache.splits import DomainSplit, Piece, Side, SplitConfig
from trainer.data.token_cache.token_writer import TokenWriter
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError

MAX_DOMAINS = 128  # most domains of a source; each needs six open files, or eight during ingestion


class _DomainWriter:
    """Splits and writes the documents of one domain."""

    def __init__(
        self, name: str, split: DomainSplit, writers: Mapping[Side, TokenWriter], tokenizer: Tokenizer
    ) -> None:
        self._name, self._split, self._writers, self._tokenizer = name, split, writers, tokenizer
        self._num_documents, self._is_chat = 0, False

    def add(self, document: Document) -> int:
        """Write the pieces whose side is known after this document; return their bytes."""
        self._num_documents += 1
        self._is_chat |= document.is_whole
        return self._write(self._split.add(document))

    def finish(self) -> DomainInfo:
        self._write(self._split.finish())
        return DomainInfo(
            name=self._name,
            is_cut=self._split.kind == "tail",
            num_documents=self._num_documents,
            is_chat=self._is_chat,
            train=self._writers["train"].info(),
            validation=self._writers["validation"].info(),
        )

    def _write(self, pieces: Sequence[Piece]) -> int:
        return sum(write_document(self._writers[side], self._tokenizer, document) for side, document in pieces)


def ingest(
    documents: Iterable[Document],
    folder: Path,
    *,
    tokenizer: Tokenizer,
    split: SplitConfig,
    advance: Callable[[int], None] = lambda num_bytes: None,
    lengths: Mapping[str, int] | None = None,
) -> list[DomainInfo]:
    """Write the token files of documents into an empty folder; return the domains by name.

    One side of a domain may be empty; see `check_sides`. `advance` is called with the bytes of text that each document
    has added. Split kind `tail` needs the `lengths` of `count_characters`. Raises DataError for too many domains.
    """
    with ExitStack() as files:
        writers: dict[str, _DomainWriter] = {}
        for document in documents:
            name = document.domain
            if name not in writers:
                if len(writers) == MAX_DOMAINS:
                    raise DataError(
                        f"data.sources: more than {MAX_DOMAINS} domains in one source; that is the limit; check that "
                        "domain_key names a kind of text and not a single document"
                    )
                domain_split = DomainSplit(split, num_characters=None if lengths is None else lengths[name])
                sides = files.enter_context(write_sides(folder, f"{name}.", tokenizer))
                writers[name] = _DomainWriter(name, domain_split, sides, tokenizer)
            advance(writers[name].add(document))
        return [writers[name].finish() for name in sorted(writers)]


def count_characters(documents: Iterable[Document]) -> Counter[str]:
    """Return the characters of each domain's text, prompts included."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts[document.domain] += document.num_characters
    return counts


def check_sides(domain: DomainInfo, split: SplitConfig) -> None:
    """Raise DataError for a domain without text on one side of the split."""
    for side in SIDES:
        if domain.side(side).num_documents > 0:
            continue
        if domain.is_chat and domain.num_documents == 1:
            raise DataError(
                f"data.split: domain {domain.name} has one conversation, which is not divided; one is learned and "
                "another one held out; give it more conversations"
            )
        if domain.is_cut:
            raise DataError(
                f"data.split: domain {domain.name} has too little text to hold out {split.fraction} of it; both sides "
                "need at least one character; give it more text"
            )
        if split.kind == "auto":
            raise DataError(
                f"data.split: all {domain.num_documents} documents of domain {domain.name} are the same text, which "
                "would be both learned and held out; add other text, or use data.split.kind: tail"
            )
        raise DataError(
            f"data.split: kind hash at fraction {split.fraction} leaves the {side} side of domain {domain.name} empty "
            f"(documents: {domain.num_documents}); both sides need one; use data.split.kind: tail"
        )


def no_documents(name: str, skipped: SkippedRecords) -> DataError:
    """Return the error for a source without usable documents."""
    if not skipped.count:
        return DataError(f"data.sources: {name} holds no documents; it needs some; remove or correct it")
    return DataError(
        f"data.sources: {name} holds no usable documents: on_bad_row: skip left out {skipped.count} ({skipped}), the "
        f"first of them {skipped.first[0]}"
    )
