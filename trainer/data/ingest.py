"""From documents to token files: each document is read, split, tokenised and written before the next one."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from trainer.config.base import Config
from trainer.data.config import SplitConfig
from trainer.data.shards import ShardInfo, TokenWriter
from trainer.data.sources.base import Source
from trainer.data.splits import DomainSplit, Piece, Side
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError

MAX_DOMAINS = 128
"""Each has four files open while it is written."""

_REPORT_BYTES = 1 << 20
"""Text between two reports of progress."""


class Progress(Protocol):
    """Is told how far the corpus is."""

    def update(self, done_bytes: int, total_bytes: int, label: str) -> None:
        """Note that about done_bytes of total_bytes are done; `label` says what is being done."""


class DomainInfo(Config):
    """What the manifest knows of one domain."""

    name: str
    source: int
    """Index into `data.sources`."""
    train: ShardInfo
    validation: ShardInfo


class _DomainWriter:
    """One domain while it is written."""

    def __init__(
        self, name: str, source: int, split: DomainSplit, *, tokenizer: Tokenizer, folder: Path, files: ExitStack
    ) -> None:
        self.source = source
        self.split = split
        self._name = name
        self._tokenizer = tokenizer
        self._num_documents = 0
        sides: tuple[Side, Side] = ("train", "validation")
        self._sides = {
            side: files.enter_context(
                TokenWriter(
                    folder,
                    f"{name}.{side}",
                    vocab_size=tokenizer.vocab_size,
                    end_of_document=tokenizer.end_of_document,
                )
            )
            for side in sides
        }

    def add(self, text: str) -> int:
        """Write what is certain after this document; return the bytes written."""
        self._num_documents += 1
        return self._write(self.split.add(text))

    def finish(self, *, fraction: float) -> DomainInfo:
        """Write what waited for the end.

        Raises:
            DataError: if a side got no text.
        """
        self._write(self.split.finish())
        sides = {side: writer.info() for side, writer in self._sides.items()}
        for side, info in sides.items():
            if info.num_documents > 0:
                continue
            if self.split.kind == "tail":
                raise DataError(
                    f"data.split: domain {self._name} has too little text to hold out {fraction} of it; "
                    "both sides need at least one character; give it more text"
                )
            raise DataError(
                f"data.split: kind hash at fraction {fraction} leaves the {side} side of domain {self._name} "
                f"empty (documents: {self._num_documents}); both sides need one; use data.split.kind: tail"
            )
        return DomainInfo(name=self._name, source=self.source, **sides)

    def _write(self, pieces: Sequence[Piece]) -> int:
        num_written = 0
        for piece in pieces:
            num_bytes = len(piece.text.encode("utf-8"))
            self._sides[piece.side].write(self._tokenizer.encode(piece.text), num_bytes=num_bytes)
            num_written += num_bytes
        return num_written


def ingest(
    sources: Sequence[Source],
    folder: Path,
    *,
    tokenizer: Tokenizer,
    split: SplitConfig,
    total_bytes: int,
    progress: Progress | None,
) -> list[DomainInfo]:
    """Write the token files of all sources into `folder`.

    Returns:
        The domains, by source, then by name.

    Raises:
        DataError: if a source or document is unusable, two sources share a domain or a side stays empty.
    """
    done_bytes = reported_bytes = 0
    with ExitStack() as files:
        writers: dict[str, _DomainWriter] = {}
        for index, source in enumerate(sources):
            # Only a tail cut through several documents must know what comes; it reads everything twice.
            lengths = _count_characters(source) if split.kind == "tail" else None
            found = False
            for document in source.documents():
                found = True
                name = document.domain
                if name not in writers:
                    domain_split = DomainSplit(split, num_characters=lengths[name] if lengths is not None else None)
                    writers[name] = _DomainWriter(
                        name, index, domain_split, tokenizer=tokenizer, folder=folder, files=files
                    )
                    _check_number(len(writers))
                _check_source(writers[name].source, index, domain=name)
                done_bytes += writers[name].add(document.text)
                if progress is not None and done_bytes - reported_bytes >= _REPORT_BYTES:
                    reported_bytes = done_bytes
                    # Text may be more than its files (gzip), or twice in them (code and docstrings).
                    progress.update(min(done_bytes, total_bytes), total_bytes, "tokenising")
            if not found:
                raise DataError(f"data.sources: source {index} holds no documents; it needs some; remove or correct it")
        domains = [writer.finish(fraction=split.fraction) for writer in writers.values()]
    if progress is not None:
        progress.update(total_bytes, total_bytes, "tokenising")
    return sorted(domains, key=lambda domain: (domain.source, domain.name))


def _count_characters(source: Source) -> Counter[str]:
    counts: Counter[str] = Counter()
    for document in source.documents():
        counts[document.domain] += len(document.text)
    return counts


def _check_number(num_domains: int) -> None:
    if num_domains > MAX_DOMAINS:
        raise DataError(
            f"data.sources: more than {MAX_DOMAINS} domains; that is the limit; check that domain_key names a kind of "
            "text and not a single document"
        )


def _check_source(first: int, now: int, *, domain: str) -> None:
    if first != now:
        raise DataError(
            f"data.sources: sources {first} and {now} both have domain {domain}; a domain is of one source; give each "
            "its own `domain`"
        )
