"""Files that survive a power failure: written whole, flushed, then given their name."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path

_COPIED_BYTES = 1 << 20
_MANY = 200
"""Files, of which each by itself takes longer than all that the system holds back."""


class NotRegular(OSError):
    """Something else has the name of a file: a link, a pipe, a folder, a device."""


def open_regular(path: str | os.PathLike[str], flags: int, *, through_links: bool = False) -> int:
    """Open a file as `os.open` does, but nothing that is no file: a pipe is not waited for, a device not read.

    Raises:
        NotRegular: if something else has its name.
        OSError: if the system refuses.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | (0 if through_links else os.O_NOFOLLOW), 0o644)
    except OSError as error:
        is_link = error.errno == errno.ELOOP and not through_links
        if is_link or error.errno in (errno.EISDIR, errno.ENXIO):  # the last one: a pipe that nobody reads
            raise NotRegular(error.errno, "is no regular file", os.fspath(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(errno.EINVAL, "is no regular file", os.fspath(path))
    return descriptor


def is_open_file(path: Path, descriptor: int) -> bool:
    """Tell whether an open file still has this name: neither removed nor replaced."""
    mine = os.fstat(descriptor)
    try:
        there = path.lstat()
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def open_unshared(path: Path, flags: int) -> int:
    """Open a regular file to be written, once no other name shares its content: a snapshot by `cp -al` stays as it is.

    Raises:
        NotRegular: if something else has its name.
        OSError: if the system refuses.
    """
    descriptor = open_regular(path, flags)
    if os.fstat(descriptor).st_nlink < 2:
        return descriptor
    os.close(descriptor)
    _unshare(path)
    return open_regular(path, flags)


def _unshare(path: Path) -> None:
    """Replace a file by a copy of it."""
    temporary = _beside(path)
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as shared, temporary.open("xb") as file:
            shutil.copyfileobj(shared, file, _COPIED_BYTES)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    sync_folder(path.parent)


def _beside(path: Path) -> Path:
    """Return a name that nobody has, for what is to become the file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def replace_file(path: Path, content: str) -> None:
    """Replace a file by `content`; whoever reads it sees the old or the new one, also after a power failure.

    Raises:
        OSError: if the disk refuses; the old file is untouched and nothing half-written stays.
    """
    temporary = _beside(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_files(paths: Sequence[Path]) -> None:
    """Wait until files are on the disk; of many at once everything that the system still holds back is written."""
    if len(paths) > _MANY:
        os.sync()
        return
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
