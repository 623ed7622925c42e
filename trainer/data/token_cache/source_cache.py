"""One source in the token cache: found there, or ingested part by part.

CACHE/NAME            a finished source (cache_folder.py); NAME identifies everything but the content of its files
CACHE/NAME.parts/     an unfinished one: sources.json lists its files, and each part is complete or absent
"""

import logging
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

from trainer.atomic_io import replace_file
from trainer.config.base import Config
from trainer.config.build_plugin import build_plugin, plugin_errors
from trainer.data.chat.encode_rows import ChatSetting
from trainer.data.records.bad_records import SkippedRecords, merge_skipped
from trainer.data.records.base import SourcePart
from trainer.data.sources.base import Source
from trainer.data.sources.chat_options import ChatOptions
from trainer.data.sources.registry import InstalledSourceConfig, SourceConfig
from trainer.data.token_cache.cache_folder import publish, temporary_path
from trainer.data.token_cache.domain_files import DomainInfo, is_domain_intact
from trainer.data.token_cache.ingest import no_documents
from trainer.data.token_cache.input_files import Content, FileState
from trainer.data.token_cache.join_parts import join_parts
from trainer.data.token_cache.read_tasks import RESULT, ReadTask
from trainer.data.token_cache.signed_json import hash_of, read_signed, signed_json
from trainer.data.token_cache.splits import SplitConfig
from trainer.data.tokenizers.base import Tokenizer

_FORMAT = 3  # raise with any change to the token files or to the documents of a source
_MANIFEST, _PARTS_CONTENT = "manifest.json", "sources.json"
_log = logging.getLogger(__name__)


class SourceManifest(Config):
    """Inputs and domains of a finished source."""

    format: Literal[3]
    tokenizer: str
    vocab_size: int
    content: Content
    domains: list[DomainInfo]
    skipped: SkippedRecords = SkippedRecords()


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSource:
    """A source, its current files, and its folder in the cache."""

    index: int  # index of the source in `data.sources`
    config: SourceConfig
    source: Source
    content: Content
    folder: Path
    tokenizer: Tokenizer
    split: SplitConfig
    chat: ChatSetting | None
    """How conversations are encoded; None if no source of the run has any."""

    @classmethod
    def locate(
        cls,
        config: SourceConfig,
        index: int,
        *,
        split: SplitConfig,
        cache_dir: str,
        tokenizer: Tokenizer,
        chat: ChatSetting | None,
    ) -> Self:
        """Look up the files of a source and its folder; raise DataError if a file is missing."""
        source = build_plugin(config, Source, f"data.sources.{index}")
        with plugin_errors(config, f"data.sources.{index}: {config.kind}: listing its files"):
            content = Content(origin=source.origin(), files=[FileState.of(path) for path in source.files()])
        options: dict[str, Any] = {"source": _identity(config), "split": split.model_dump(mode="json")}
        if isinstance(config, ChatOptions) and chat is not None:
            options["chat"] = chat.fingerprint()
        identity = {"format": _FORMAT, "tokenizer": tokenizer.fingerprint, **options}
        return cls(
            index=index,
            config=config,
            source=source,
            content=content,
            folder=Path(cache_dir) / hash_of(identity)[:16],
            tokenizer=tokenizer,
            split=split,
            chat=chat,
        )

    def manifest(self) -> SourceManifest | None:
        """Return the manifest in the cache, whatever its content; None if there is none."""
        try:
            return read_signed(self.folder / _MANIFEST, SourceManifest, of=self.folder.name)
        except (OSError, ValueError):
            return None

    def untouched(self) -> SourceManifest | None:
        """Return the manifest if no file was touched since; takes no lock, so the cache may be read-only."""
        manifest = self.manifest()
        if manifest is None or manifest.content.quick_hash() != self.content.quick_hash():
            return None
        return manifest if self.is_intact(manifest) else None

    def reusable(self) -> SourceManifest | None:
        """Return the manifest if it is intact and of the same content; call it under the lock of the folder."""
        if not self.folder.exists():
            return None
        manifest = self.manifest()
        if manifest is None or not self.is_intact(manifest):
            _log.warning("%s: the token cache is damaged; building it again", self.folder)
            return None
        before, now = manifest.content, self.content
        if before.quick_hash() == now.quick_hash():  # built by the process that held the lock
            return manifest
        sizes, sizes_now = ([file.size_bytes for file in content.files] for content in (before, now))
        if before.origin != now.origin or sizes != sizes_now:
            return None
        now = now.hashed()
        if [file.sha256 for file in before.files] != [file.sha256 for file in now.files]:
            return None
        manifest = manifest.model_copy(update={"content": now})  # touched or moved: skip the hashing next time
        replace_file(self.folder / _MANIFEST, signed_json(manifest, of=self.folder.name))
        return manifest

    def tasks(self, *, is_alone: bool) -> list[ReadTask]:
        """Divide the source into tasks, some of which a killed process may have done.

        Unless `is_alone`, other processes may be building the source, and this one uses a folder of its own.
        """
        parts = [None] if self.split.kind == "tail" else list(self.source.parts())
        if len(parts) == 1:  # nothing to resume from
            return [self._task(parts[0], self.split, temporary_path(self.folder))]
        folder = self._parts_folder(is_alone=is_alone)
        # The reader of one of several parts cannot know whether a document is the only one of its domain.
        split = self.split.model_copy(update={"kind": "hash"})
        return [self._task(part, split, folder / f"part-{index:05d}") for index, part in enumerate(parts)]

    def join(self, tasks: Sequence[ReadTask]) -> tuple[Path, SourceManifest]:
        """Join the finished tasks in a temporary folder, ready for `publish`.

        Raises DataError if a file changed or is a copy of another, or a domain has no text on one side of the split.
        """
        content = self.content.hashed()
        self.content.refuse_changes()
        results = [task.result() for task in tasks]
        skipped = merge_skipped(result.skipped for result in results)
        if self.source.rejects_copies:
            content.refuse_copies(unused=set(skipped.empty_files))
        folder = tasks[0].folder
        if len(tasks) > 1:
            folder = temporary_path(self.folder)
            folder.mkdir()
        parts = [(task.folder, result.domains) for task, result in zip(tasks, results, strict=True)]
        domains = join_parts(parts, folder, tokenizer=self.tokenizer, split=self.split)
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
        return folder, manifest

    def publish(self, folder: Path, manifest: SourceManifest) -> None:
        """Write the manifest and move the folder to its place in the cache; its other files must be on the disk."""

        def is_published() -> bool:
            return self.manifest() == manifest and self.is_intact(manifest, verify=True)

        (folder / RESULT).unlink(missing_ok=True)  # of a single part; the manifest replaces it
        (folder / _MANIFEST).write_text(signed_json(manifest, of=self.folder.name))
        publish(folder, self.folder, unless=is_published)

    def _task(self, part: SourcePart | None, split: SplitConfig, folder: Path) -> ReadTask:
        return ReadTask(source=self.config, part=part, split=split, chat=self.chat, folder=folder)

    def _parts_folder(self, *, is_alone: bool) -> Path:
        """Return the folder of the parts; parts of other files are removed from it."""
        folder = self.folder.with_name(f"{self.folder.name}.parts") if is_alone else temporary_path(self.folder)
        content = folder / _PARTS_CONTENT
        if not content.is_file() or content.read_text() != self.content.model_dump_json():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            content.write_text(self.content.model_dump_json())
        return folder

    def is_intact(self, manifest: SourceManifest, *, verify: bool = False) -> bool:
        """Return whether all files exist in the size of the manifest; `verify` compares their hashes too."""
        return all(
            is_domain_intact(self.folder, domain, vocab_size=manifest.vocab_size, verify=verify)
            for domain in manifest.domains
        )


def _identity(config: SourceConfig) -> dict[str, Any]:
    """Return everything the documents depend on, except the content of files."""
    options = config.model_dump(mode="json", exclude={"weight"})  # the mixture is drawn from the same tokens
    if options.get("on_bad_row") == "error":  # keeps the name of caches from before this option
        del options["on_bad_row"]
    if "weight_key" in options and options["weight_key"] is None:
        del options["weight_key"]
    if not isinstance(config, InstalledSourceConfig):
        return options | {"relative_to": str(Path.cwd())}
    versions = {"python": platform.python_version()}
    if "cpp" in config.domains:
        try:
            versions["torch"] = metadata.version("torch")
        except metadata.PackageNotFoundError:  # built from source, without a package; its files are compared
            versions["torch"] = "unknown"
    return options | versions
