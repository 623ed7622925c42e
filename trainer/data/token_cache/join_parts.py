"""From the token files of a source's parts to those of the source."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from trainer.data.config import SplitConfig
from trainer.data.records.bad_records import SkippedRows
from trainer.data.sources.base import Document
from trainer.data.token_cache.ingest import SIDES, DomainInfo, check_sides, ingest
from trainer.data.token_cache.resplit import documents, with_both_sides
from trainer.data.token_cache.shards import TokenFile, TokenWriter, open_token_file
from trainer.data.tokenizers.base import Tokenizer


class IngestedPart(NamedTuple):
    """Result of `ingest` for a part."""

    folder: Path
    domains: list[DomainInfo]
    skipped: SkippedRows


def assemble(
    parts: Sequence[IngestedPart], folder: Path, *, tokenizer: Tokenizer, split: SplitConfig
) -> list[DomainInfo]:
    """Join the token files of parts, in order, into `folder`; a single part is there already.

    Returns:
        The domains, by name.

    Raises:
        DataError: if a domain has no text on one side of the split.
    """
    by_name: dict[str, list[tuple[Path, DomainInfo]]] = {}
    for part in parts:
        for domain in part.domains:
            by_name.setdefault(domain.name, []).append((part.folder, domain))
    found = []
    for name in sorted(by_name):
        pieces = by_name[name]
        if len(parts) == 1:
            domain = pieces[0][1]
        elif split.kind == "auto" and sum(piece.num_documents for _, piece in pieces) == 1:
            domain = _cut(*pieces[0], folder, tokenizer=tokenizer, split=split)
        else:
            domain = _join(pieces, folder, tokenizer=tokenizer)
        if split.kind == "auto" and not domain.is_sharded and not all(getattr(domain, s).num_documents for s in SIDES):
            domain = with_both_sides(domain, folder, tokenizer=tokenizer)
        check_sides(domain, split)
        found.append(domain)
    return found


def _join(pieces: Sequence[tuple[Path, DomainInfo]], folder: Path, *, tokenizer: Tokenizer) -> DomainInfo:
    name = pieces[0][1].name
    sides = {}
    with ExitStack() as files:
        for side in SIDES:
            writer = files.enter_context(
                TokenWriter(
                    folder,
                    f"{name}.{side}",
                    vocab_size=tokenizer.vocab_size,
                    end_of_document=tokenizer.end_of_document,
                )
            )
            for part, domain in pieces:
                info = getattr(domain, side)
                writer.extend(open_token_file(part, f"{name}.{side}", info, vocab_size=tokenizer.vocab_size))
            sides[side] = writer.info()
    num_documents = sum(domain.num_documents for _, domain in pieces)
    return DomainInfo(
        name=name,
        is_sharded=False,
        num_documents=num_documents,
        train=sides["train"],
        validation=sides["validation"],
    )


def _cut(part: Path, domain: DomainInfo, folder: Path, *, tokenizer: Tokenizer, split: SplitConfig) -> DomainInfo:
    """Split the only document of a domain by its tail: that it is the only one was not known to who read its part."""
    side = next(side for side in SIDES if getattr(domain, side).num_documents)
    name = f"{domain.name}.{side}"
    file = open_token_file(part, name, getattr(domain, side), vocab_size=tokenizer.vocab_size)
    document = _only_document(file, domain.name, tokenizer)
    (cut,) = ingest(
        [document],
        folder,
        tokenizer=tokenizer,
        split=split.model_copy(update={"kind": "tail"}),
        advance=lambda _: None,
        lengths={domain.name: len(document.prompt) + len(document.text)},
    )
    return cut


def _only_document(file: TokenFile, domain: str, tokenizer: Tokenizer) -> Document:
    ((prompt, text),) = documents(file, tokenizer)
    return Document(name=domain, domain=domain, text=text, prompt=prompt)
