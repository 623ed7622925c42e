"""The corpus: every source's text as memory-mapped tokens, read once and reused while its files stay the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.data.config import DataConfig
from trainer.data.mixture import domain_shares
from trainer.data.records.bad_records import SkippedRows
from trainer.data.sources.registry import HfStreamSourceConfig
from trainer.data.token_cache.block_stream import BlockStream, StreamedSource
from trainer.data.token_cache.build_cache import IngestProgress, prepare
from trainer.data.token_cache.cache import cache_error
from trainer.data.token_cache.checksums import Damaged
from trainer.data.token_cache.shards import TokenFile, open_token_file
from trainer.data.token_cache.signed_records import hash_of
from trainer.data.token_cache.skipped import SkippedOf
from trainer.data.token_cache.source_cache import CachedSource, SourceManifest
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError

_NUM_ATTEMPTS = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """All text of a run as tokens; the tuples have one entry per domain, in the same order."""

    domains: tuple[str, ...]
    """Names: by source, then in alphabetical order."""
    weights: tuple[float, ...]
    """Share of the rows drawn from each domain; they sum to 1."""
    train: tuple[TokenFile, ...]
    """Training tokens; of a stream, its first block."""
    validation: tuple[TokenFile, ...]
    streams: tuple[BlockStream | None, ...]
    """Streams of domains that are read during training; None for those that were ingested."""
    folders: tuple[Path, ...]
    """Folders of the domains' token files."""
    tokenizer: Tokenizer
    skipped: tuple[SkippedOf, ...] = ()
    """Rows left out of sources with `on_bad_row: skip`; of a stream, of its first block."""
    remarks: tuple[str, ...] = ()
    """Remarks for the user who starts a run, a line each."""
    fingerprint: str
    """Hash of all tokens, domains and the tokenizer: equal exactly if the same can be learned, wherever files are."""


def build_corpus(
    config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: IngestProgress | None = None
) -> Corpus:
    """Return the corpus of `config`, from the cache as far as the files it was built from are unchanged.

    Files of the same size and modification time count as unchanged; otherwise their content is compared. Several
    processes may call this at once: one builds, the others wait for it. One that is killed has lost at most the parts
    that it was at. What is in the cache is compared with what was written there, when it is opened or first read.

    Args:
        config: the `data` section.
        tokenizer: of a run that has one already. None: the one that the section describes.
        progress: is told how far a build is.

    Raises:
        DataError: if a source is unusable, a side of the split stays empty, or the cache is damaged or not writable.
        ResourceError: if the disk is full, or a process that read text was killed.
    """
    tokenizer = tokenizer or config.tokenizer.build(config, progress=progress)
    for _ in range(_NUM_ATTEMPTS):
        prepared = []
        try:
            prepared = prepare(config, tokenizer, progress=progress)
            corpus = _open(config, prepared, tokenizer)
        except FileNotFoundError:
            continue
        except Damaged:
            if _is_as_found(prepared):
                raise
            continue
        except OSError as error:  # what goes wrong with a source's files is a DataError already
            raise cache_error(config.cache_dir, error) from error
        if _is_as_found(prepared):
            return corpus
    raise DataError(
        f"data.cache_dir: {config.cache_dir}: other runs keep replacing what is in it; a text must stay the same while "
        "it is learned; stop what changes it, or set a folder of this run's own"
    )


def _is_as_found(prepared: Sequence[tuple[CachedSource, SourceManifest]]) -> bool:
    """Tell whether no folder was replaced between its manifest and its last token file, by who sees newer text."""
    return all(source.manifest() == manifest for source, manifest in prepared)


class _Domain(NamedTuple):
    """One domain, found."""

    source: int
    name: str
    folder: Path
    train: TokenFile
    validation: TokenFile
    content: list[str]
    """Hashes of what it holds."""
    stream: BlockStream | None = None
    skipped: SkippedRows = SkippedRows()
    """Rows left out of the first block of a stream."""


def _open(config: DataConfig, prepared: Sequence[tuple[CachedSource, SourceManifest]], tokenizer: Tokenizer) -> Corpus:
    streams = [
        _opened_stream(config, index, source, tokenizer)
        for index, source in enumerate(config.sources)
        if isinstance(source, HfStreamSourceConfig)
    ]
    ingested = [domain for source, manifest in prepared for domain in _opened(source, manifest, tokenizer)]
    found = sorted([*ingested, *streams], key=lambda domain: domain.source)
    _check_sources(found)
    skipped = [SkippedOf(source.index, None, manifest.skipped) for source, manifest in prepared]
    skipped += [SkippedOf(domain.source, 0, domain.skipped) for domain in streams]
    return Corpus(
        domains=tuple(domain.name for domain in found),
        weights=domain_shares(
            config.mixture,
            sources=[domain.source for domain in found],
            weights=[source.weight for source in config.sources],
            num_tokens=[domain.train.num_tokens for domain in found],
        ),
        train=tuple(domain.train for domain in found),
        validation=tuple(domain.validation for domain in found),
        streams=tuple(domain.stream for domain in found),
        folders=tuple(domain.folder for domain in found),
        tokenizer=tokenizer,
        remarks=tuple(_remarks(prepared)),
        skipped=tuple(one for one in sorted(skipped, key=lambda one: one.source) if one.rows.count),
        # What is learned. The split is in it as the content of the two sides; paths and times are not.
        fingerprint=hash_of(
            {"tokenizer": tokenizer.fingerprint, "domains": [[domain.name, *domain.content] for domain in found]}
        ),
    )


def _remarks(prepared: Sequence[tuple[CachedSource, SourceManifest]]) -> Iterator[str]:
    for source, manifest in prepared:
        yield from (f"data.sources.{source.index}: {line}" for line in source.source.taken())
        for domain in manifest.domains:
            if domain.is_resplit:
                yield (
                    f"data.split: the hash at fraction {source.split.fraction} leaves one side of domain {domain.name} "
                    f"empty; split by the text whose hash is nearest: {domain.train.num_documents} documents are "
                    f"learned and {domain.validation.num_documents} held out"
                )


def _opened(source: CachedSource, manifest: SourceManifest, tokenizer: Tokenizer) -> Iterator[_Domain]:
    for domain in manifest.domains:
        train, validation = (
            open_token_file(source.folder, f"{domain.name}.{side}", info, vocab_size=tokenizer.vocab_size)
            for side, info in (("train", domain.train), ("validation", domain.validation))
        )
        content = [*domain.train.content(), *domain.validation.content()]
        yield _Domain(source.index, domain.name, source.folder, train, validation, content)


def _opened_stream(config: DataConfig, index: int, source: HfStreamSourceConfig, tokenizer: Tokenizer) -> _Domain:
    """Return a domain that is read while it is learned; its first block stands for its text."""
    cached = CachedSource.of(config, index, tokenizer)
    stream = BlockStream(
        StreamedSource(
            config=source,
            files=tuple(cached.content.files),
            folder=cached.folder.with_name(f"{cached.folder.name}-{cached.content.at_a_glance()}.stream"),
            tokenizer=tokenizer,
            held_out=config.split.fraction,
        )
    )
    block = stream.block(0)
    for side in (block.info.train, block.info.validation):
        if side.num_documents == 0:
            is_all = block.info.end.epoch > 0
            what, remedy = ("it", "give it more") if is_all else ("its first block", "raise block_tokens")
            raise DataError(
                f"data.sources: {source.domain}: {what} has {block.info.train.num_documents} documents to learn and "
                f"{block.info.validation.num_documents} held out; both need one; {remedy}"
            )
    # The whole is not read: its addresses, the sizes of its files and its first block have to do.
    content = [cached.content.origin, *(str(file.size_bytes) for file in cached.content.files)]
    content += [*block.info.train.content(), *block.info.validation.content()]
    return _Domain(
        index, source.domain, cached.folder, block.train, block.validation, content, stream, block.info.skipped
    )


def _check_sources(found: Sequence[_Domain]) -> None:
    first: dict[str, int] = {}
    for domain in found:
        if first.setdefault(domain.name, domain.source) != domain.source:
            raise DataError(
                f"data.sources: sources {first[domain.name]} and {domain.source} both have domain {domain.name}; a "
                "domain is of one source; give each its own `domain`"
            )
