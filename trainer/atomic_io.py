"""Atomic file writes that survive a power failure: write, flush, rename."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_COPY_BLOCK_BYTES = 1 << 20
_CANNOT_SHARE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
"""errno values of `copy_file_range` between file systems that cannot do it."""
_SYNC_ALL_ABOVE = 200  # above this many files, one os.sync() is faster than an fsync per file


class NotRegular(OSError):
    """The path is not a regular file but a link, a pipe, a folder or a device."""


def open_regular(path: str | os.PathLike[str], flags: int, *, through_links: bool = False) -> int:
    """Open a file as `os.open` does, but only a regular file: never block on a pipe or read a device.

    Raises:
        NotRegular: if it is not a regular file.
        OSError: if the system refuses.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | (0 if through_links else os.O_NOFOLLOW), 0o644)
    except OSError as error:
        is_link = error.errno == errno.ELOOP and not through_links
        if is_link or error.errno in (errno.EISDIR, errno.ENXIO):  # ENXIO: a pipe without a reader
            raise NotRegular(error.errno, "is no regular file", os.fspath(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(errno.EINVAL, "is no regular file", os.fspath(path))
    return descriptor


def is_open_file(path: Path, descriptor: int) -> bool:
    """Return whether a path still names an open file, which was neither removed nor replaced."""
    mine = os.fstat(descriptor)
    try:
        there = path.lstat()
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def open_unshared(path: Path, flags: int) -> int:
    """Open a regular file for writing; copy it first if it has other hard links: a `cp -al` snapshot is not changed."""
    descriptor = open_regular(path, flags)
    if os.fstat(descriptor).st_nlink < 2:
        return descriptor
    os.close(descriptor)
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as shared, replacing(path) as file:
            shutil.copyfileobj(shared, file, _COPY_BLOCK_BYTES)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    return open_regular(path, flags)


def replace_file(path: Path, content: str) -> None:
    """Replace a file atomically: readers see the old or the new content, even after a power failure.

    If the disk refuses (OSError), the old file is unchanged and no temporary file is left.
    """
    with replacing(path) as file:
        file.write(content.encode())


def copy_file(source: Path, target: Path, *, size_bytes: int | None = None) -> None:
    """Copy a regular file, or its beginning, to a new one and flush it; blocks are shared if the file system can."""
    with os.fdopen(open_regular(source, os.O_RDONLY), "rb") as old, target.open("xb") as new:
        left = os.fstat(old.fileno()).st_size
        left = left if size_bytes is None else min(left, size_bytes)
        try:
            while left > 0 and (copied := os.copy_file_range(old.fileno(), new.fileno(), left)):
                left -= copied
        except OSError as error:
            if error.errno not in _CANNOT_SHARE:
                raise
        while left > 0 and (block := os.read(old.fileno(), min(left, _COPY_BLOCK_BYTES))):
            new.write(block)
            left -= len(block)
        new.flush()
        os.fsync(new.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces the one at `path` at the end, unless there was an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_files(paths: Sequence[Path]) -> None:
    """Flush files to disk: each by fsync, or everything by one os.sync() if they are many."""
    if len(paths) > _SYNC_ALL_ABOVE:
        os.sync()
        return
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that renames and new files in it are durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
