"""The corpus: text of all sources as memory-mapped tokens, ingested once and reused while the files do not change."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.config.build_plugin import build_plugin
from trainer.data.chat.chat_template import ChatTemplate
from trainer.data.chat.config import ChatTemplateConfig
from trainer.data.chat.encode_rows import ANY_LENGTH, ChatSetting
from trainer.data.chat.find_template import find_template
from trainer.data.config import DataConfig
from trainer.data.mixture import domain_shares
from trainer.data.records.bad_records import SkippedRecords
from trainer.data.sources.document_options import StreamOptions
from trainer.data.token_cache.block_stream import BlockStream
from trainer.data.token_cache.build_cache import IngestProgress, build_sources
from trainer.data.token_cache.cache_folder import cache_error
from trainer.data.token_cache.checksums import DamagedCache
from trainer.data.token_cache.domain_files import open_side
from trainer.data.token_cache.fold_files import fold_files
from trainer.data.token_cache.signed_json import hash_of
from trainer.data.token_cache.skipped import SourceSkips
from trainer.data.token_cache.source_cache import CachedSource, SourceManifest
from trainer.data.token_cache.stream_block import StreamedSource
from trainer.data.token_cache.token_files import TokenFile
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.registry import BPETokenizerConfig, ByteTokenizerConfig
from trainer.errors import DataError

_MAX_ATTEMPTS = 10
_Ingested = tuple[CachedSource, SourceManifest]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """All text of a run as tokens; the tuples have one entry per domain, in the same order."""

    domains: tuple[str, ...]
    """Names, ordered by source and then alphabetically."""
    contents: tuple[str, ...]
    """Hash of the text of each domain."""
    weights: tuple[float, ...]
    """Share of the training rows of each domain; they sum to 1."""
    train: tuple[TokenFile, ...]
    """Training text; the first block of a stream."""
    validation: tuple[TokenFile, ...]
    streams: tuple[BlockStream | None, ...]
    """Streams of the domains read during training; None for ingested domains."""
    folders: tuple[Path, ...]
    tokenizer: Tokenizer
    skipped: tuple[SourceSkips, ...] = ()
    """Records skipped under `on_bad_row: skip`; for a stream, those of its first block."""
    remarks: tuple[str, ...] = ()
    """Remarks for the user at the start of a run, a line each."""
    fingerprint: str
    """Hash of tokenizer, domains and all tokens: equal exactly if the same can be learned, regardless of paths."""


def build_tokenizer(config: DataConfig, *, progress: IngestProgress | None = None) -> Tokenizer:
    """Return the tokenizer of the `data` section; a BPE comes from the cache or is trained on the training text.

    Raises DataError if the tokenizer, or the text of a BPE, is unusable, and ResourceError as `build_corpus`.
    """
    if not isinstance(config.tokenizer, BPETokenizerConfig):
        return build_plugin(config.tokenizer, Tokenizer, "data.tokenizer")
    from trainer.data.train_bpe import train_bpe  # needs `tokenizers`

    as_bytes = {"tokenizer": ByteTokenizerConfig(), "chat_template": ChatTemplateConfig()}
    text = build_corpus(config.model_copy(update=as_bytes), seq_len=ANY_LENGTH, progress=progress)
    return train_bpe(
        text.train,
        text_fingerprint=text.fingerprint,
        vocab_size=config.tokenizer.vocab_size,
        min_frequency=config.tokenizer.min_frequency,
        max_train_bytes=config.tokenizer.max_train_bytes,
        cache_dir=config.cache_dir,
        chat=config.tokenizer.chat,
        progress=progress,
    )


def build_corpus(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    seq_len: int | None = None,
    template: ChatTemplate | None = None,
    progress: IngestProgress | None = None,
) -> Corpus:
    """Return the corpus of a `data` section, from the cache for sources whose files have not changed.

    Files of the same size and modification time count as unchanged; otherwise their content is compared. Several
    processes may call this at once: one builds, the others wait. A killed build loses at most the parts in progress.
    The content of the cache is verified when it is opened or first read. `tokenizer` is that of an existing run.
    Sources of conversations need `model.seq_len`; `template` is that of an existing run.

    Raises:
        DataError: if a source is unusable, a side of the split is empty, or the cache is damaged or not writable.
        ResourceError: if the disk is full, or a process that read text was killed.
    """
    tokenizer = tokenizer or build_tokenizer(config, progress=progress)
    chat = _chat_setting(config, tokenizer, seq_len, template)
    for _ in range(_MAX_ATTEMPTS):
        ingested: list[_Ingested] = []
        try:
            sources = [
                _locate(config, index, tokenizer, chat)
                for index, source in enumerate(config.sources)
                if not isinstance(source, StreamOptions)
            ]
            manifests = build_sources(sources, max_workers=config.workers, progress=progress)
            ingested = list(zip(sources, manifests, strict=True))
            corpus = _open(config, ingested, tokenizer, chat)
        except FileNotFoundError:
            continue
        except DamagedCache:
            if _is_unchanged(ingested):
                raise
            continue
        except OSError as error:  # errors of a source's files are DataErrors already
            raise cache_error(config.cache_dir, error) from error
        if _is_unchanged(ingested):
            return corpus
    raise DataError(
        f"data.cache_dir: {config.cache_dir}: other runs keep replacing its content; a text must not change during "
        "training; stop what changes it, or give this run a cache_dir of its own"
    )


def _is_unchanged(ingested: Sequence[_Ingested]) -> bool:
    """Return whether no other process, which saw newer text, has replaced a folder since its manifest was read."""
    return all(source.manifest() == manifest for source, manifest in ingested)


class _Domain(NamedTuple):
    source: int
    name: str
    folder: Path
    train: TokenFile
    validation: TokenFile
    hashes: list[str]
    stream: BlockStream | None = None
    skipped: SkippedRecords = SkippedRecords()
    """Records skipped in the first block of a stream."""


def _chat_setting(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int | None, template: ChatTemplate | None
) -> ChatSetting | None:
    """Return how conversations are encoded; None if there are none."""
    if not config.has_chats:
        return None
    if seq_len is None:
        raise ValueError("seq_len is None; sources of conversations need that of the model")
    template = template or find_template(config.chat_template, config.tokenizer, tokenizer)
    return ChatSetting(template=template, variables=config.chat_template.variables, seq_len=seq_len)


def _locate(config: DataConfig, index: int, tokenizer: Tokenizer, chat: ChatSetting | None) -> CachedSource:
    return CachedSource.locate(
        config.sources[index],
        index,
        split=config.cached_split,
        cache_dir=config.cache_dir,
        tokenizer=tokenizer,
        chat=chat,
    )


def _open(config: DataConfig, ingested: Sequence[_Ingested], tokenizer: Tokenizer, chat: ChatSetting | None) -> Corpus:
    streams = [
        _open_stream(config, source, _locate(config, index, tokenizer, chat))
        for index, source in enumerate(config.sources)
        if isinstance(source, StreamOptions)
    ]
    opened = [domain for source, manifest in ingested for domain in _open_domains(config, source, manifest)]
    domains = sorted([*opened, *streams], key=lambda domain: domain.source)
    first: dict[str, int] = {}
    for domain in domains:
        if first.setdefault(domain.name, domain.source) != domain.source:
            both = f"sources {first[domain.name]} and {domain.source} both have domain {domain.name}"
            raise DataError(f"data.sources: {both}; a domain belongs to one source; give each its own `domain`")
    skipped = [SourceSkips(source.index, None, manifest.skipped) for source, manifest in ingested]
    skipped += [SourceSkips(domain.source, 0, domain.skipped) for domain in streams]
    return Corpus(
        domains=tuple(domain.name for domain in domains),
        contents=tuple(hash_of(domain.hashes) for domain in domains),
        weights=domain_shares(
            by=config.mixture.by,
            temperature=config.mixture.temperature,
            sources=[domain.source for domain in domains],
            weights=[source.weight for source in config.sources],
            num_tokens=[domain.train.num_tokens for domain in domains],
        ),
        train=tuple(domain.train for domain in domains),
        validation=tuple(domain.validation for domain in domains),
        streams=tuple(domain.stream for domain in domains),
        folders=tuple(domain.folder for domain in domains),
        tokenizer=tokenizer,
        remarks=tuple(_remarks(config, ingested)),
        skipped=tuple(one for one in sorted(skipped, key=lambda one: one.source) if one.records.count),
        # The split is part of it as the content of the two sides; paths and times are not.
        fingerprint=hash_of(
            {"tokenizer": tokenizer.fingerprint, "domains": [[domain.name, *domain.hashes] for domain in domains]}
        ),
    )


def _remarks(config: DataConfig, ingested: Sequence[_Ingested]) -> Iterator[str]:
    for source, manifest in ingested:
        yield from (f"data.sources.{source.index}: {line}" for line in source.source.folder_notes())
        for domain in manifest.domains:
            if domain.is_resplit and config.fold is None:
                yield (
                    f"data.split: the hash at fraction {source.split.fraction} leaves one side of domain {domain.name} "
                    f"empty; moved the text with the nearest hash there: {domain.train.num_documents} documents are "
                    f"learned and {domain.validation.num_documents} held out"
                )


def _open_domains(config: DataConfig, source: CachedSource, manifest: SourceManifest) -> Iterator[_Domain]:
    folder, domains = source.folder, manifest.domains
    if config.fold is not None:
        folder, domains = fold_files(folder, domains, fold=config.fold, tokenizer=source.tokenizer)
    for domain in domains:
        train = open_side(folder, domain, "train", vocab_size=manifest.vocab_size)
        validation = open_side(folder, domain, "validation", vocab_size=manifest.vocab_size)
        yield _Domain(source.index, domain.name, folder, train, validation, domain.content())


def _open_stream(config: DataConfig, source: StreamOptions, cached: CachedSource) -> _Domain:
    """Open a streamed domain, represented by its first block."""
    folder = cached.folder.with_name(f"{cached.folder.name}-{cached.content.quick_hash()}.stream")
    files, held_out = tuple(cached.content.files), config.split.fraction
    stream = BlockStream(
        StreamedSource(
            config=source,
            files=files,
            folder=folder,
            tokenizer=cached.tokenizer,
            held_out=held_out,
            chat=cached.chat,
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
    # The whole text is not read: addresses, file sizes and the first block identify it.
    content = [cached.content.origin, *(str(file.size_bytes) for file in cached.content.files)]
    content += [*block.info.train.content(), *block.info.validation.content()]
    return _Domain(
        cached.index, source.domain, cached.folder, block.train, block.validation, content, stream, block.info.skipped
    )
