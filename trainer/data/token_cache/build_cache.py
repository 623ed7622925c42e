"""All sources of a run as token files: found in the cache or made, by one process for all that ask."""

import os
import resource
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

from trainer.atomic_io import sync_files
from trainer.data.config import DataConfig
from trainer.data.sources.registry import HfStreamSourceConfig
from trainer.data.token_cache.cache import remove_remains, sole_builder
from trainer.data.token_cache.read_tasks import ReadTask
from trainer.data.token_cache.source_cache import CachedSource, SourceManifest
from trainer.data.token_cache.workers import run_tasks
from trainer.data.tokenizers.base import Tokenizer


class IngestProgress(Protocol):
    """Is told how far the corpus is."""

    def update(self, done_bytes: int, total_bytes: int, label: str) -> None:
        """Note that about done_bytes of total_bytes are done; `label` says what is being done."""


def prepare(
    config: DataConfig, tokenizer: Tokenizer, *, progress: IngestProgress | None
) -> list[tuple[CachedSource, SourceManifest]]:
    """Return every source that is ingested with its manifest, in the order of the config.

    Raises:
        DataError: if a source is unusable.
        ResourceError: if a process that read text was killed.
        OSError: if the cache cannot be written.
    """
    _allow_many_files()
    sources = [
        CachedSource.of(config, index, tokenizer)
        for index, source in enumerate(config.sources)
        if not isinstance(source, HfStreamSourceConfig)
    ]
    manifests = {source.folder: source.untouched() for source in sources}
    missing = {source.folder: source for source in sources if manifests[source.folder] is None}
    if missing:
        manifests |= _build(list(missing.values()), config.workers, progress=progress)
    return [(source, manifest) for source in sources if (manifest := manifests[source.folder]) is not None]


def _build(
    missing: Sequence[CachedSource], workers: int | None, *, progress: IngestProgress | None
) -> dict[Path, SourceManifest | None]:
    total_bytes = sum(source.size_bytes for source in missing)

    def tell(done_bytes: int, label: str) -> None:
        if progress is not None:
            # Text may be more than its files (gzip), or twice in them (code and docstrings).
            progress.update(min(done_bytes, total_bytes), total_bytes, label)

    with ExitStack() as locks:
        is_alone = {
            source.folder: locks.enter_context(
                sole_builder(source.folder, waiting=lambda: tell(0, "waiting for another process that reads this text"))
            )
            for source in sorted(missing, key=lambda source: source.folder)  # in one order: nobody waits in a circle
        }
        if all(is_alone.values()):
            remove_remains(is_alone)
        found = {source.folder: source.reusable() for source in missing}
        plans = [
            (source, source.tasks(is_alone=is_alone[source.folder]))
            for source in missing
            if found[source.folder] is None
        ]
        todo = [task for source, tasks in plans for task in tasks if not task.is_done(source.tokenizer)]
        try:
            if todo:
                max_processes = workers or len(os.sched_getaffinity(0))
                run_tasks(todo, plans[0][0].tokenizer, max_processes, lambda done: tell(done, "tokenising"))
            finished = [source.assemble(tasks) for source, tasks in plans]
        except BaseException:
            _keep_what_is_done(plans)
            if all(is_alone.values()):
                remove_remains(is_alone)
            raise
        sync_files([path for one in finished for path in one.files()])
        for one in finished:  # a manifest says that all else is on the disk
            one.publish()
            found[one.source.folder] = one.manifest
        for _, tasks in plans:
            if len(tasks) > 1:
                shutil.rmtree(tasks[0].folder.parent, ignore_errors=True)
        tell(total_bytes, "tokenising")
    return found


def _keep_what_is_done(plans: Sequence[tuple[CachedSource, list[ReadTask]]]) -> None:
    """Remove what a build that failed leaves, but for whole parts of several: the next start goes on from those."""
    for source, tasks in plans:
        unfinished = [task for task in tasks if len(tasks) == 1 or not task.is_done(source.tokenizer)]
        for task in unfinished:
            shutil.rmtree(task.folder, ignore_errors=True)
        if len(unfinished) == len(tasks) > 1:
            shutil.rmtree(tasks[0].folder.parent, ignore_errors=True)


def _allow_many_files() -> None:
    """Let this process have as many files open as it may: a thousand sources are some thousand mapped files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # a system that says "unlimited" and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
