"""One source as token files: found in the cache, or made, part by part, and kept there.

CACHE/NAME            a source that is finished (cache.py); the name stands for everything but the files' content
CACHE/NAME.parts/     one that is not: sources.json says of which files, and each part is whole or not there (tasks.py)
"""

import logging
import platform
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from trainer.atomic_io import replace_file
from trainer.config.base import Config
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.records.bad_records import SkippedRows, all_skipped
from trainer.data.sources.base import Source
from trainer.data.sources.registry import InstalledSourceConfig, SourceConfig
from trainer.data.token_cache.cache import FileState, new_name, publish
from trainer.data.token_cache.ingest import SIDES, DomainInfo, no_documents
from trainer.data.token_cache.join_parts import assemble
from trainer.data.token_cache.read_tasks import RESULT, ReadTask
from trainer.data.token_cache.shards import is_intact, paths
from trainer.data.token_cache.signed_records import hash_of, read_record, record_text
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError

_FORMAT = 3  # raised by whatever changes the files or the documents of a source
_MANIFEST, _PARTS_OF = "manifest.json", "sources.json"
_log = logging.getLogger(__name__)


class Content(Config):
    """Inputs that a source was read from."""

    origin: str
    """Addresses and versions of what is not local."""
    files: list[FileState]

    def at_a_glance(self) -> str:
        """Return a short name for what can be known without reading: addresses, paths, sizes and times."""
        return hash_of([self.origin, *([file.path, file.size_bytes, file.mtime_ns] for file in self.files)])[:16]


class SourceManifest(Config):
    """Inputs and results of a finished source."""

    format: Literal[3]
    tokenizer: str
    vocab_size: int
    content: Content
    domains: list[DomainInfo]
    skipped: SkippedRows = SkippedRows()
    """Rows left out of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSource:
    """A source, what it is read from now, and its place in the cache."""

    index: int
    """Index of the source in `data.sources`."""
    config: SourceConfig
    source: Source
    content: Content
    folder: Path
    tokenizer: Tokenizer
    split: SplitConfig

    @classmethod
    def of(cls, data: DataConfig, index: int, tokenizer: Tokenizer) -> Self:
        """Look at the files of a source.

        Raises:
            DataError: if one is missing.
        """
        config = data.sources[index]
        source = config.build()
        made_of = {
            "format": _FORMAT,
            "source": _identity(config),
            "split": data.split.model_dump(mode="json"),
            "tokenizer": tokenizer.fingerprint,
        }
        return cls(
            index=index,
            config=config,
            source=source,
            content=Content(origin=source.origin(), files=[FileState.of(path) for path in source.files()]),
            folder=Path(data.cache_dir) / hash_of(made_of)[:16],
            tokenizer=tokenizer,
            split=data.split,
        )

    @property
    def size_bytes(self) -> int:
        """Size of all local files in bytes."""
        return sum(file.size_bytes for file in self.content.files)

    def manifest(self) -> SourceManifest | None:
        """Return the manifest that is in the cache, of whatever content."""
        try:
            return read_record(self.folder / _MANIFEST, SourceManifest, of=self.folder.name)
        except (OSError, ValueError):
            return None

    def untouched(self) -> SourceManifest | None:
        """Return the manifest if no file was touched since; takes no lock, so a cache may be read-only."""
        manifest = self.manifest()
        if manifest is None or manifest.content.at_a_glance() != self.content.at_a_glance():
            return None
        return manifest if self.is_intact(manifest) else None

    def reusable(self) -> SourceManifest | None:
        """Return the manifest if it was made of the same content and is whole; under the lock of the folder."""
        if not self.folder.exists():
            return None
        manifest = self.manifest()
        if manifest is None or not self.is_intact(manifest):
            _log.warning("%s: the token cache is damaged; building it again", self.folder)
            return None
        before, now = manifest.content, self.content
        if before.at_a_glance() == now.at_a_glance():  # built by the process that was waited for
            return manifest
        if before.origin != now.origin or _sizes(before) != _sizes(now):
            return None
        hashed = self._hashed()
        if [file.sha256 for file in before.files] != [file.sha256 for file in hashed.files]:
            return None
        manifest = manifest.model_copy(update={"content": hashed})  # touched or moved: remember, to be quick next time
        replace_file(self.folder / _MANIFEST, record_text(manifest, of=self.folder.name))
        return manifest

    def tasks(self, *, is_alone: bool) -> list[ReadTask]:
        """Cut the source into parts, of which a killed process may have done some.

        Args:
            is_alone: nobody else can be at it. Otherwise a folder of this process's own is used, from its beginning.

        Raises:
            DataError: if what is to be read is not there.
        """
        parts = [None] if self.split.kind == "tail" else list(self.source.parts())
        if len(parts) == 1:  # which is nothing to go on from
            return [ReadTask(source=self.config, part=parts[0], split=self.split, folder=new_name(self.folder))]
        folder = self._parts_folder(is_alone=is_alone)
        # Who reads one of several parts cannot know whether a document is its domain's only one.
        split = self.split.model_copy(update={"kind": "hash"})
        return [
            ReadTask(source=self.config, part=part, split=split, folder=folder / f"part-{index:05d}")
            for index, part in enumerate(parts)
        ]

    def assemble(self, tasks: Sequence[ReadTask]) -> "UnpublishedSource":
        """Make the source of all its parts, beside its place.

        Raises:
            DataError: if a file changed, is there twice, or a domain has no text on one side of the split.
        """
        content = self._hashed()
        for before in self.content.files:
            if FileState.of(Path(before.path)) != before:
                raise DataError(f"{before.path}: changed while it was read; it must stay as it is; start again")
        parts = [task.result() for task in tasks]
        skipped = all_skipped(part.skipped for part in parts)
        if self.source.rejects_copies:
            _refuse_copies(content, unless=set(skipped.empty_files))
        folder = tasks[0].folder
        if len(tasks) > 1:
            folder = new_name(self.folder)
            folder.mkdir()
        domains = assemble(parts, folder, tokenizer=self.tokenizer, split=self.split)
        if not domains:
            raise no_documents(f"source {self.index}", skipped)
        manifest = SourceManifest(
            format=_FORMAT,
            tokenizer=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            content=content,
            domains=domains,
            skipped=skipped,
        )
        return UnpublishedSource(self, folder, manifest)

    def _parts_folder(self, *, is_alone: bool) -> Path:
        """Return the folder of the parts, empty if those that are there are of other files."""
        folder = self.folder.with_name(f"{self.folder.name}.parts") if is_alone else new_name(self.folder)
        made_of = folder / _PARTS_OF
        if not made_of.is_file() or made_of.read_text() != self.content.model_dump_json():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            made_of.write_text(self.content.model_dump_json())
        return folder

    def _hashed(self) -> Content:
        return self.content.model_copy(update={"files": [file.hashed() for file in self.content.files]})

    def is_intact(self, manifest: SourceManifest, *, verify: bool = False) -> bool:
        """Return whether all files are there in the size that the manifest knows; `verify` hashes them too."""
        return all(
            is_intact(
                self.folder,
                f"{domain.name}.{side}",
                getattr(domain, side),
                vocab_size=manifest.vocab_size,
                verify=verify,
            )
            for domain in manifest.domains
            for side in SIDES
        )


class UnpublishedSource(NamedTuple):
    """A source that is whole, in a folder that has not its name yet."""

    source: CachedSource
    folder: Path
    manifest: SourceManifest

    def files(self) -> list[Path]:
        """Return what must be on the disk before it is published."""
        return [
            path
            for domain in self.manifest.domains
            for side in SIDES
            for path in paths(
                self.folder, f"{domain.name}.{side}", getattr(domain, side), vocab_size=self.manifest.vocab_size
            )
        ]

    def publish(self) -> None:
        """Give it its manifest and its name, in place of what had it."""

        def is_there() -> bool:
            return self.source.manifest() == self.manifest and self.source.is_intact(self.manifest, verify=True)

        (self.folder / RESULT).unlink(missing_ok=True)  # of its only part; the manifest says all of it
        (self.folder / _MANIFEST).write_text(record_text(self.manifest, of=self.source.folder.name))
        publish(self.folder, self.source.folder, unless=is_there)


def _identity(config: SourceConfig) -> dict[str, Any]:
    """Return what the documents are a function of, but for the content of files."""
    options = config.model_dump(mode="json", exclude={"weight"})  # another mixture is drawn from the same tokens
    if options.get("on_bad_row") == "error":  # what was read before there was a choice is still what it was
        del options["on_bad_row"]
    if not isinstance(config, InstalledSourceConfig):
        return options | {"relative_to": str(Path.cwd())}
    versions = {"python": platform.python_version()}
    if "cpp" in config.domains:
        try:
            versions["torch"] = metadata.version("torch")
        except metadata.PackageNotFoundError:  # built from source without a package: its files tell
            versions["torch"] = "unknown"
    return options | versions


def _sizes(content: Content) -> list[int]:
    return [file.size_bytes for file in content.files]


def _refuse_copies(content: Content, *, unless: Collection[str]) -> None:
    """Refuse two files of the same content, `unless` nothing of them was used."""
    first: dict[str, str] = {}
    for file in content.files:
        if file.path in unless:
            continue
        assert file.sha256 is not None, "it was hashed"
        if file.sha256 in first:
            raise DataError(
                f"{file.path}: is a copy of {first[file.sha256]}; each row is read once; remove one of them"
            )
        first[file.sha256] = file.path
