"""Join the token files of a source's parts to those of the source."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from trainer.data.sources.base import Document
from trainer.data.token_cache.domain_files import (
    SIDES,
    DomainInfo,
    copy_document,
    open_side,
    write_sides,
)
from trainer.data.token_cache.ingest import check_sides, ingest
from trainer.data.token_cache.splits import SplitConfig
from trainer.data.tokenizers.base import Tokenizer


def join_parts(
    parts: Sequence[tuple[Path, Sequence[DomainInfo]]], folder: Path, *, tokenizer: Tokenizer, split: SplitConfig
) -> list[DomainInfo]:
    """Concatenate the token files of parts (folder and domains), in order, into `folder`; return the domains by name.

    A single part is already in `folder`. Raises DataError if a domain has no text on one side of the split.
    """
    by_name: dict[str, list[tuple[Path, DomainInfo]]] = {}
    for part, domains in parts:
        for domain in domains:
            by_name.setdefault(domain.name, []).append((part, domain))
    joined = []
    for _, pieces in sorted(by_name.items()):
        if len(parts) == 1:
            domain = pieces[0][1]
        elif split.kind == "auto" and sum(piece.num_documents for _, piece in pieces) == 1 and not pieces[0][1].is_chat:
            domain = _split_only_document(*pieces[0], folder, tokenizer=tokenizer, split=split)
        else:
            domain = _concatenate(pieces, folder, tokenizer=tokenizer)
        if split.kind == "auto" and not domain.is_cut and not all(domain.side(side).num_documents for side in SIDES):
            domain = _fill_empty_side(domain, folder, tokenizer=tokenizer)
        check_sides(domain, split)
        joined.append(domain)
    return joined


def _concatenate(pieces: Sequence[tuple[Path, DomainInfo]], folder: Path, *, tokenizer: Tokenizer) -> DomainInfo:
    name = pieces[0][1].name
    with write_sides(folder, f"{name}.", tokenizer) as writers:
        for side in SIDES:
            for part, domain in pieces:
                writers[side].extend(open_side(part, domain, side, vocab_size=tokenizer.vocab_size))
        sides = {side: writer.info() for side, writer in writers.items()}
    num_documents = sum(domain.num_documents for _, domain in pieces)
    is_chat = any(domain.is_chat for _, domain in pieces)
    values = {"name": name, "is_cut": False, "num_documents": num_documents, "is_chat": is_chat, **sides}
    return DomainInfo.model_validate(values)


def _split_only_document(
    part: Path, domain: DomainInfo, folder: Path, *, tokenizer: Tokenizer, split: SplitConfig
) -> DomainInfo:
    """Split the only document of a domain by its tail; the reader of its part could not know it was the only one."""
    side = next(side for side in SIDES if domain.side(side).num_documents)
    file = open_side(part, domain, side, vocab_size=tokenizer.vocab_size)
    tokens, answer = file.document(0)[0], int(file.answer_starts[0])
    prompt, text = (tokenizer.decode(part.tolist()).decode() for part in (tokens[:answer], tokens[answer:]))
    (result,) = ingest(
        [Document(name=domain.name, domain=domain.name, text=text, prompt=prompt, weight=file.weight(0))],
        folder,
        tokenizer=tokenizer,
        split=split.model_copy(update={"kind": "tail"}),
        lengths={domain.name: len(prompt) + len(text)},
    )
    return result


def _fill_empty_side(domain: DomainInfo, folder: Path, *, tokenizer: Tokenizer) -> DomainInfo:
    """Move the documents of one text to the empty side of a domain, in place.

    It is the text whose hash is nearest to the other side: no text is on both sides, and every reader moves the same
    one. (A tail split would hold out texts that are also learned.) If all documents are one text, nothing changes.
    """
    full, empty = SIDES if domain.train.num_documents else reversed(SIDES)
    file = open_side(folder, domain, full, vocab_size=tokenizer.vocab_size)
    # The first bytes of the hash decide the side (splits.is_held_out): the lowest are held out.
    texts = (tokenizer.decode(file.document(index)[0].tolist()) for index in range(file.num_documents))
    digests = [hashlib.sha256(text).digest()[:8] for text in texts]
    if len(set(digests)) < 2:
        return domain
    moved = min(digests) if empty == "validation" else max(digests)
    temporary = folder / f".{domain.name}.resplit"
    temporary.mkdir()
    with write_sides(temporary, f"{domain.name}.", tokenizer) as writers:
        for index, digest in enumerate(digests):
            copy_document(writers[empty if digest == moved else full], tokenizer, file, index)
        sides = {side: writer.info() for side, writer in writers.items()}
    for optional in ("checksums", "gaps", "weights"):  # the others are replaced
        (folder / f"{domain.name}.{full}.{optional}").unlink(missing_ok=True)
    for path in list(temporary.iterdir()):
        path.rename(folder / path.name)
    shutil.rmtree(temporary)
    return domain.model_copy(update={**sides, "is_resplit": True})
