"""Ingestion of all sources of a run: each is found in the cache or built by one process while others wait."""

import os
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from trainer.atomic_io import sync_files
from trainer.data.token_cache.cache_folder import build_lock, remove_abandoned
from trainer.data.token_cache.read_tasks import ReadTask
from trainer.data.token_cache.source_cache import CachedSource, SourceManifest
from trainer.data.token_cache.workers import run_tasks


class IngestProgress(Protocol):
    """Receiver of the progress of ingestion."""

    def update(self, done_bytes: int, total_bytes: int, label: str) -> None:
        """Show that about done_bytes of total_bytes are done, with the name of the current step."""


def build_sources(
    sources: Sequence[CachedSource], *, max_workers: int | None, progress: IngestProgress | None
) -> list[SourceManifest]:
    """Return the manifest of every source; sources that are not in the cache are ingested.

    All sources have the same tokenizer. At most `max_workers` processes read text (None: one for each core). Raises
    DataError if a source is unusable, ResourceError if a process that read text was killed, and OSError if the cache
    cannot be written.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a thousand sources map some thousand files; "unlimited" may be refused
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    manifests = {source.folder: source.untouched() for source in sources}
    missing = {source.folder: source for source in sources if manifests[source.folder] is None}
    if missing:
        manifests |= _build(list(missing.values()), max_workers or len(os.sched_getaffinity(0)), progress)
    return [manifest for source in sources if (manifest := manifests[source.folder]) is not None]


def _build(
    missing: Sequence[CachedSource], max_workers: int, progress: IngestProgress | None
) -> dict[Path, SourceManifest]:
    total_bytes = sum(file.size_bytes for source in missing for file in source.content.files)

    def show(done_bytes: int, label: str) -> None:
        if progress is not None:
            # There can be more text than bytes of files (gzip, or code and docstrings of the same file).
            progress.update(min(done_bytes, total_bytes), total_bytes, label)

    with ExitStack() as locks:
        is_alone: dict[Path, bool] = {}
        for source in sorted(missing, key=lambda source: source.folder):  # one order for all, against deadlocks
            waiting = partial(show, 0, "waiting for another process that reads this text")
            is_alone[source.folder] = locks.enter_context(build_lock(source.folder, waiting=waiting))
        if all(is_alone.values()):
            remove_abandoned(is_alone)
        manifests = {source.folder: manifest for source in missing if (manifest := source.reusable()) is not None}
        missing = [source for source in missing if source.folder not in manifests]
        manifests |= _ingest(missing, is_alone, max_workers, lambda done_bytes: show(done_bytes, "tokenising"))
        show(total_bytes, "tokenising")
    return manifests


def _ingest(
    missing: Sequence[CachedSource], is_alone: Mapping[Path, bool], max_workers: int, advance: Callable[[int], None]
) -> dict[Path, SourceManifest]:
    """Ingest and publish sources, whose locks are held."""
    plans = [(source, source.tasks(is_alone=is_alone[source.folder])) for source in missing]
    todo = [task for source, tasks in plans for task in tasks if not task.is_done(source.tokenizer)]
    try:
        if todo:
            run_tasks(todo, plans[0][0].tokenizer, max_workers, advance)
        finished = [(source, *source.join(tasks)) for source, tasks in plans]
    except BaseException:
        _keep_finished_parts(plans)
        if all(is_alone.values()):
            remove_abandoned(is_alone)
        raise
    sync_files([path for _, folder, _ in finished for path in folder.iterdir()])
    for source, folder, manifest in finished:  # a manifest promises that all other files are on the disk
        source.publish(folder, manifest)
    for _, tasks in plans:
        if len(tasks) > 1:
            shutil.rmtree(tasks[0].folder.parent, ignore_errors=True)
    return {source.folder: manifest for source, _, manifest in finished}


def _keep_finished_parts(plans: Sequence[tuple[CachedSource, list[ReadTask]]]) -> None:
    """Remove the files of a failed build, except finished parts of sources with several: the next start uses those."""
    for source, tasks in plans:
        unfinished = [task for task in tasks if len(tasks) == 1 or not task.is_done(source.tokenizer)]
        for task in unfinished:
            shutil.rmtree(task.folder, ignore_errors=True)
        if len(unfinished) == len(tasks) > 1:
            shutil.rmtree(tasks[0].folder.parent, ignore_errors=True)
