"""The corpus: every source's text as memory-mapped tokens, built once and reused while its files stay the same."""

import errno
import hashlib
import json
import logging
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trainer.config.base import Config
from trainer.data.cache import FileState, published, sole_builder
from trainer.data.config import DataConfig
from trainer.data.ingest import DomainInfo, Progress, ingest
from trainer.data.shards import TokenFile, is_intact, open_token_file
from trainer.data.sources.base import Source
from trainer.data.sources.registry import InstalledSourceConfig, SourceConfig
from trainer.data.tokenizers.base import Tokenizer
from trainer.durable import replace_file
from trainer.errors import DataError, ResourceError

_FORMAT = 1  # raised by whatever changes the files or the documents of a source
_MANIFEST = "manifest.json"
_SIDES = ("train", "validation")
_NUM_ATTEMPTS = 10
_log = logging.getLogger(__name__)


class _Manifest(Config):
    format: Literal[1]
    tokenizer: str
    vocab_size: int
    files: list[FileState]
    domains: list[DomainInfo]
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """All text of a run as tokens; the tuples have one entry per domain, in the same order."""

    domains: tuple[str, ...]
    """Names: by source, then in alphabetical order."""
    weights: tuple[float, ...]
    """Share of the rows drawn from each domain; they sum to 1."""
    train: tuple[TokenFile, ...]
    validation: tuple[TokenFile, ...]
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of all tokens, domains and the tokenizer: equal exactly if the same can be learned, wherever files are."""
    folder: Path
    """Where the token files are."""


def build_corpus(config: DataConfig, *, progress: Progress | None = None, verify: bool = False) -> Corpus:
    """Return the corpus of `config`, from the cache if the files it was built from are unchanged.

    Files of the same size and modification time count as unchanged; otherwise their content is compared. Several
    processes may call this at once: one builds, the others wait for it.

    Args:
        config: the `data` section.
        progress: is told how far a build is.
        verify: also compare the tokens in the cache with their hashes, which reads all of them.

    Raises:
        DataError: if a source is unusable, a side of the split stays empty or the cache folder cannot be written.
        ResourceError: if the disk is full.
    """
    tokenizer = config.tokenizer.build()
    sources = [source.build() for source in config.sources]
    folder = Path(config.cache_dir) / _name(config, tokenizer)
    for _ in range(_NUM_ATTEMPTS):
        try:
            corpus = _attempt(config, folder, sources=sources, tokenizer=tokenizer, progress=progress, verify=verify)
        except FileNotFoundError:
            continue
        except OSError as error:  # what goes wrong with a source's files is a DataError already
            raise _cache_error(config, error) from error
        # A process that sees newer files may have replaced the folder between the manifest and the last token file.
        now = _read_manifest(folder)
        if now is not None and now.fingerprint == corpus.fingerprint:
            return corpus
    raise DataError(
        f"data.cache_dir: {config.cache_dir}: other runs keep replacing {folder.name} in it; a text must stay the same "
        "while it is learned; stop what changes it, or set a folder of this run's own"
    )


def _attempt(
    config: DataConfig,
    folder: Path,
    *,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    progress: Progress | None,
    verify: bool,
) -> Corpus:
    files = [FileState.of(path) for source in sources for path in source.files()]

    def waiting() -> None:
        if progress is not None:
            total_bytes = sum(file.size_bytes for file in files)
            progress.update(0, total_bytes, "waiting for another process that builds this corpus")

    manifest = _untouched(folder, files, verify=verify)
    if manifest is None:
        with sole_builder(folder, waiting=waiting):
            manifest = _reusable(folder, files, verify=verify) or _build(
                config, folder, sources=sources, files=files, tokenizer=tokenizer, progress=progress
            )
    return _open(config, folder, manifest, tokenizer)


def _untouched(folder: Path, files: Sequence[FileState], *, verify: bool) -> _Manifest | None:
    """Return the manifest if no file was touched since; takes no lock, so a cache may be read-only."""
    manifest = _read_manifest(folder)
    if manifest is None or not _same_at_a_glance(manifest.files, files):
        return None
    return manifest if _is_intact(folder, manifest, verify=verify) else None


def _reusable(folder: Path, files: Sequence[FileState], *, verify: bool) -> _Manifest | None:
    """Return the manifest of what is in the cache if it was made of the same content and is whole."""
    if not folder.exists():
        return None
    manifest = _read_manifest(folder)
    if manifest is None or not _is_intact(folder, manifest, verify=verify):
        _log.warning("%s: the token cache is damaged; building it again", folder)
        return None
    if _same_at_a_glance(manifest.files, files):  # built by the process that was waited for
        return manifest
    if [file.size_bytes for file in manifest.files] != [file.size_bytes for file in files]:
        return None
    hashed = [file.hashed() for file in files]
    if [file.sha256 for file in manifest.files] != [file.sha256 for file in hashed]:
        return None
    manifest = manifest.model_copy(update={"files": hashed})  # touched or moved: remember, to be quick next time
    replace_file(folder / _MANIFEST, manifest.model_dump_json(indent=1))
    return manifest


def _build(
    config: DataConfig,
    folder: Path,
    *,
    sources: Sequence[Source],
    files: Sequence[FileState],
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> _Manifest:
    manifest: _Manifest | None = None

    def is_there() -> bool:
        return manifest is not None and _read_manifest(folder) == manifest and _is_intact(folder, manifest, verify=True)

    with published(folder, unless=is_there) as temporary:
        domains = ingest(
            sources,
            temporary,
            tokenizer=tokenizer,
            split=config.split,
            total_bytes=sum(file.size_bytes for file in files),
            progress=progress,
        )
        hashed = [file.hashed() for file in files]
        for before in files:
            if FileState.of(Path(before.path)) != before:
                raise DataError(f"{before.path}: changed while it was read; it must stay as it is; start again")
        manifest = _Manifest(
            format=_FORMAT,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            files=hashed,
            domains=domains,
            fingerprint=_fingerprint(domains, tokenizer),
        )
        replace_file(temporary / _MANIFEST, manifest.model_dump_json(indent=1))
    return manifest


def _open(config: DataConfig, folder: Path, manifest: _Manifest, tokenizer: Tokenizer) -> Corpus:
    in_source = Counter(domain.source for domain in manifest.domains)
    total_weight = sum(source.weight for source in config.sources)
    train, validation = (
        tuple(
            open_token_file(folder, f"{domain.name}.{side}", getattr(domain, side), vocab_size=manifest.vocab_size)
            for domain in manifest.domains
        )
        for side in _SIDES
    )
    return Corpus(
        domains=tuple(domain.name for domain in manifest.domains),
        weights=tuple(config.sources[d.source].weight / in_source[d.source] / total_weight for d in manifest.domains),
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=manifest.fingerprint,
        folder=folder,
    )


def _name(config: DataConfig, tokenizer: Tokenizer) -> str:
    """Name the cache folder by everything but the files' content that the tokens are a function of."""
    made_of = {
        "format": _FORMAT,
        "sources": [_identity(source) for source in config.sources],
        "split": config.split.model_dump(mode="json"),
        "tokenizer": tokenizer.fingerprint,
    }
    return _hash(made_of)[:16]


def _identity(config: SourceConfig) -> dict[str, Any]:
    options = config.model_dump(mode="json", exclude={"weight"})  # another mixture is drawn from the same tokens
    if not isinstance(config, InstalledSourceConfig):
        return options | {"relative_to": str(Path.cwd())}
    versions = {"python": platform.python_version()}
    if "cpp" in config.domains:
        try:
            versions["torch"] = metadata.version("torch")
        except metadata.PackageNotFoundError:  # built from source without a package: its files tell
            versions["torch"] = "unknown"
    return options | versions


def _fingerprint(domains: Sequence[DomainInfo], tokenizer: Tokenizer) -> str:
    """Hash what is learned. The split is in it as the content of the two sides; paths and times are not."""
    contents = [[domain.name, domain.train.sha256, domain.validation.sha256] for domain in domains]
    return _hash({"tokenizer": tokenizer.fingerprint, "domains": contents})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def _read_manifest(folder: Path) -> _Manifest | None:
    try:
        return _Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def _same_at_a_glance(known: Sequence[FileState], now: Sequence[FileState]) -> bool:
    def visible(files: Sequence[FileState]) -> list[tuple[str, int, int]]:
        return [(file.path, file.size_bytes, file.mtime_ns) for file in files]

    return visible(known) == visible(now)


def _is_intact(folder: Path, manifest: _Manifest, *, verify: bool) -> bool:
    return all(
        is_intact(folder, f"{domain.name}.{side}", getattr(domain, side), vocab_size=manifest.vocab_size, verify=verify)
        for domain in manifest.domains
        for side in _SIDES
    )


def _cache_error(config: DataConfig, error: OSError) -> DataError | ResourceError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"data.cache_dir: {config.cache_dir}: the disk is full ({reason}); tokens need about as much room as the "
            "text; free some or set another folder"
        )
    return DataError(
        f"data.cache_dir: {config.cache_dir}: cannot be written ({reason}); tokens are kept there; set a folder that "
        "this user can write to"
    )
