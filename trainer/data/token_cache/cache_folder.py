"""Folders of the cache that are complete or absent, with any number of builders, killed at any time.

CACHE/NAME                a finished folder; its manifest.json was written when all else was on the disk
CACHE/NAME.parts          finished parts of an unfinished source (source_cache.py)
CACHE/.NAME.RANDOM        being built, or left by a killed builder and removed by the next one
CACHE/NAME.lock           locked during a build; the lock ends with its process
"""

import errno
import fcntl
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import DataError, ResourceError


@contextmanager
def build_lock(folder: Path, *, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock for building `folder`; call `waiting` before waiting for another process.

    Yields False on file systems without locks, where others may be building at the same time: the last rename wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            yield False
            return
        yield True


def remove_abandoned(folders: Collection[Path]) -> None:
    """Remove the temporary folders of killed builds of these folders; call it under their locks."""
    names = {folder.name for folder in folders}
    for cache in {folder.parent for folder in folders}:
        for path in list(cache.glob(".*")):
            if path.name.split(".")[1] in names:
                shutil.rmtree(path, ignore_errors=True)


def temporary_path(folder: Path) -> Path:
    """Return a new path to build `folder` at; if it is never published, the next builder removes it."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")


def publish(temporary: Path, folder: Path, *, unless: Callable[[], bool]) -> None:
    """Rename a folder from `temporary_path` to `folder`, replacing an existing one.

    Without locks, another builder may have been faster: its folder stays if `unless` returns True, which means that it
    holds the same. Processes that have files of the old folder open can still read them.
    """
    while True:
        try:
            temporary.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if unless():
            shutil.rmtree(temporary, ignore_errors=True)
            return
        old = temporary_path(folder)
        with suppress(FileNotFoundError):  # another builder moved it away first
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def cache_error(cache_dir: str, error: OSError) -> DataError | ResourceError:
    """Return the error for a cache folder that the system does not let us write."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"data.cache_dir: {cache_dir}: the disk is full ({reason}); tokens take about as much space as the text; "
            "free some or set another folder"
        )
    return DataError(
        f"data.cache_dir: {cache_dir}: cannot be written ({reason}); it holds the tokenised text; set a folder that "
        "this user can write to"
    )
