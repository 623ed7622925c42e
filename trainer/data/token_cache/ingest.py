"""From documents to token files: each document is read, split, tokenised and written before the next one."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from trainer.config.base import Config
from trainer.data.config import SplitConfig
from trainer.data.records.bad_records import SkippedRows
from trainer.data.sources.base import Document
from trainer.data.token_cache.shards import ShardInfo, TokenWriter
from trainer.data.token_cache.splits import DomainSplit, Piece, Side
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError

MAX_DOMAINS = 128
"""Most domains of a source; each has six files open while it is written."""

SIDES: tuple[Side, Side] = ("train", "validation")


class DomainInfo(Config):
    """Statistics of one domain's token files."""

    name: str
    is_sharded: bool
    """Split by its tail, not by the hashes of its documents."""
    num_documents: int
    """Number of documents as they were read: one that was cut counts once."""
    is_resplit: bool = False
    """The hash left one side empty, and one text has changed sides (resplit.py)."""
    train: ShardInfo
    validation: ShardInfo


class _DomainWriter:
    """One domain while it is written."""

    def __init__(self, name: str, split: DomainSplit, *, tokenizer: Tokenizer, folder: Path, files: ExitStack) -> None:
        self._name = name
        self._split = split
        self._tokenizer = tokenizer
        self._num_documents = 0
        self._sides = {
            side: files.enter_context(
                TokenWriter(
                    folder,
                    f"{name}.{side}",
                    vocab_size=tokenizer.vocab_size,
                    end_of_document=tokenizer.end_of_document,
                )
            )
            for side in SIDES
        }

    def add(self, document: Document) -> int:
        """Write what is certain after this document; return the bytes written."""
        self._num_documents += 1
        return self._write(self._split.add(document.text, prompt=document.prompt))

    def finish(self) -> DomainInfo:
        """Write what waited for the end."""
        self._write(self._split.finish())
        return DomainInfo(
            name=self._name,
            is_sharded=self._split.kind == "tail",
            num_documents=self._num_documents,
            train=self._sides["train"].info(),
            validation=self._sides["validation"].info(),
        )

    def _write(self, pieces: Sequence[Piece]) -> int:
        return sum(
            write_text(self._sides[piece.side], self._tokenizer, piece.text, prompt=piece.prompt) for piece in pieces
        )


def write_text(writer: TokenWriter, tokenizer: Tokenizer, text: str, *, prompt: str = "") -> int:
    """Append a document; return its bytes of text."""
    tokens = tokenizer.encode(text)
    num_prompt_tokens, num_bytes = 0, len(text.encode())
    if prompt:
        # Each by itself: where the prompt ends is a border of tokens, as it is when only the prompt is given.
        before = tokenizer.encode(prompt)
        tokens = np.concatenate([before, tokens])
        num_prompt_tokens = len(before)
        num_bytes += len(prompt.encode())
    writer.write(tokens, num_bytes=num_bytes, num_prompt_tokens=num_prompt_tokens)
    return num_bytes


def ingest(
    documents: Iterable[Document],
    folder: Path,
    *,
    tokenizer: Tokenizer,
    split: SplitConfig,
    advance: Callable[[int], None],
    lengths: Mapping[str, int] | None = None,
) -> list[DomainInfo]:
    """Write the token files of some documents into `folder`.

    Args:
        documents: in their order.
        folder: an empty one.
        tokenizer: makes the tokens.
        split: what is held out.
        advance: is told the bytes of text that are done, after each document.
        lengths: characters of each domain, which split kind `tail` needs; see `count_characters`.

    Returns:
        The domains, by name. One side of a domain may be empty: see `check_sides`.

    Raises:
        DataError: if a document is unusable or there are too many domains.
    """
    done_bytes = 0
    with ExitStack() as files:
        writers: dict[str, _DomainWriter] = {}
        for document in documents:
            name = document.domain
            if name not in writers:
                _check_number(len(writers) + 1)
                domain_split = DomainSplit(split, num_characters=None if lengths is None else lengths[name])
                writers[name] = _DomainWriter(name, domain_split, tokenizer=tokenizer, folder=folder, files=files)
            done_bytes += writers[name].add(document)
            advance(done_bytes)
        return [writers[name].finish() for name in sorted(writers)]


def count_characters(documents: Iterable[Document]) -> Counter[str]:
    """Return the length of each domain's text, prompts included."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts[document.domain] += len(document.prompt) + len(document.text)
    return counts


def check_sides(domain: DomainInfo, split: SplitConfig) -> None:
    """Refuse a domain of which one side of the split has no text.

    Raises:
        DataError: naming the domain.
    """
    for side in SIDES:
        info: ShardInfo = getattr(domain, side)
        if info.num_documents > 0:
            continue
        if domain.is_sharded:
            raise DataError(
                f"data.split: domain {domain.name} has too little text to hold out {split.fraction} of it; both sides "
                "need at least one character; give it more text"
            )
        if split.kind == "auto":
            raise DataError(
                f"data.split: all documents of domain {domain.name} ({domain.num_documents}) are one text, so "
                "that none can be held out that is not learned; give it other text, or use data.split.kind: tail"
            )
        raise DataError(
            f"data.split: kind hash at fraction {split.fraction} leaves the {side} side of domain {domain.name} empty "
            f"(documents: {domain.num_documents}); both sides need one; use data.split.kind: tail"
        )


def no_documents(name: str, skipped: SkippedRows) -> DataError:
    """Return the error for a source that nothing can be learned from."""
    if not skipped.count:
        return DataError(f"data.sources: {name} holds no documents; it needs some; remove or correct it")
    return DataError(
        f"data.sources: {name} holds no documents that can be used: on_bad_row: skip left out {skipped.count} "
        f"({skipped}), the first of them {skipped.first[0]}"
    )


def _check_number(num_domains: int) -> None:
    if num_domains > MAX_DOMAINS:
        raise DataError(
            f"data.sources: more than {MAX_DOMAINS} domains in one source; that is the limit; check that domain_key "
            "names a kind of text and not a single document"
        )
