"""Token files of one fold, copied from those of the whole source: text is read and encoded once for all folds.

CACHE/NAME            the source, split by the default rule: the only place where its text is read
CACHE/NAME-fold-KEY   the same documents on other sides; KEY identifies the fold and every token of the source
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.atomic_io import sync_files
from trainer.config.base import Config
from trainer.data.token_cache.cache_folder import build_lock, publish, remove_abandoned, temporary_path
from trainer.data.token_cache.domain_files import (
    SIDES,
    DomainInfo,
    copy_document,
    is_domain_intact,
    open_side,
    write_sides,
)
from trainer.data.token_cache.folds import FoldConfig, fold_of
from trainer.data.token_cache.signed_json import hash_of, read_signed, signed_json
from trainer.data.token_cache.token_files import TokenFile
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError

_FORMAT = 1  # raise with any change to the files of the same fold
_MANIFEST = "manifest.json"


class _FoldManifest(Config):
    """Domains of a finished fold."""

    domains: list[DomainInfo]


def fold_files(
    base: Path, domains: Sequence[DomainInfo], *, fold: FoldConfig, tokenizer: Tokenizer
) -> tuple[Path, list[DomainInfo]]:
    """Return the folder and the domains of a fold of the source in `base`, from the cache if they are there.

    Several processes may call this at once: one copies, the others wait.

    Raises:
        DataError: if a domain is a single document, or a fold of it is empty.
        OSError: if the cache cannot be written.
    """
    for domain in domains:
        if domain.is_cut:
            raise DataError(
                f"data.fold: domain {domain.name} is a single document, and folds part no document; give it as several "
                "(a file or a line each), or use data.split"
            )
    identity = [_FORMAT, fold.model_dump(mode="json"), tokenizer.fingerprint]
    key = hash_of([*identity, [[domain.name, *domain.content()] for domain in domains]])[:16]
    folder = base.with_name(f"{base.name}-fold-{key}")
    found = _finished(folder, tokenizer)  # takes no lock, so the cache may be read-only
    if found is None:
        with build_lock(folder, waiting=lambda: None) as is_alone:
            if is_alone:
                remove_abandoned([folder])
            found = _finished(folder, tokenizer)  # another process may have built it meanwhile
            if found is None:
                found = _build(base, domains, folder, fold=fold, tokenizer=tokenizer)
    return folder, found


def _finished(folder: Path, tokenizer: Tokenizer) -> list[DomainInfo] | None:
    """Return the domains of a fold in the cache; None if it is absent or damaged."""
    try:
        domains = read_signed(folder / _MANIFEST, _FoldManifest, of=folder.name).domains
    except (OSError, ValueError):
        return None
    is_intact = all(is_domain_intact(folder, domain, vocab_size=tokenizer.vocab_size) for domain in domains)
    return domains if is_intact else None


def _build(
    base: Path, domains: Sequence[DomainInfo], folder: Path, *, fold: FoldConfig, tokenizer: Tokenizer
) -> list[DomainInfo]:
    temporary = temporary_path(folder)
    temporary.mkdir()
    try:
        copied = [_copy(base, domain, temporary, fold=fold, tokenizer=tokenizer) for domain in domains]
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_files(list(temporary.iterdir()))  # the manifest promises that all other files are on the disk
    (temporary / _MANIFEST).write_text(signed_json(_FoldManifest(domains=copied), of=folder.name))
    publish(temporary, folder, unless=lambda: _finished(folder, tokenizer) == copied)
    return copied


def _copy(base: Path, domain: DomainInfo, folder: Path, *, fold: FoldConfig, tokenizer: Tokenizer) -> DomainInfo:
    """Copy the documents of a domain to their sides."""
    documents_of = [0] * fold.of
    with write_sides(folder, f"{domain.name}.", tokenizer) as writers:
        for file, index in _documents(base, domain, tokenizer):
            text = tokenizer.decode(file.document(index)[0].tolist())
            number = fold_of(text, of=fold.of, seed=fold.seed)
            documents_of[number] += 1
            copy_document(writers["validation" if number == fold.index else "train"], tokenizer, file, index)
        sides = {side: writer.info() for side, writer in writers.items()}
    if 0 in documents_of:  # any of them: a cross-validation should not end at its last fold
        raise DataError(
            f"data.fold: fold {documents_of.index(0)} of {fold.of} of domain {domain.name} is empty, with "
            f"{domain.num_documents} documents; each fold needs one; use fewer folds, another data.fold.seed, or more "
            "text"
        )
    return domain.model_copy(update={**sides, "is_resplit": False})


def _documents(base: Path, domain: DomainInfo, tokenizer: Tokenizer) -> Iterator[tuple[TokenFile, int]]:
    for side in SIDES:
        file = open_side(base, domain, side, vocab_size=tokenizer.vocab_size)
        for index in range(file.num_documents):
            yield file, index
