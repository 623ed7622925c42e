"""Files that survive a power failure: written whole, flushed, then given their name."""

import errno
import os
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path

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


def replace_file(path: Path, content: str) -> None:
    """Replace a file by `content`; whoever reads it sees the old or the new one, also after a power failure.

    Raises:
        OSError: if the disk refuses; the old file is untouched and nothing half-written stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
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
