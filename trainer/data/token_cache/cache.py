"""A folder that is either whole or not there, however many processes build it and wherever they are killed.

CACHE/NAME                the finished folder; its manifest.json was written once all else was on the disk
CACHE/NAME.parts          what is done of one that is not finished (source_cache.py)
CACHE/.NAME.RANDOM        being built, or the remains of a killed build: removed by the next builder
CACHE/NAME.lock           locked while somebody builds; the lock ends with its process
"""

import errno
import fcntl
import hashlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from trainer.config.base import Config
from trainer.data.sources.files import readable
from trainer.errors import DataError, ResourceError


class FileState(Config):
    """One file that was read: what tells quickly, and what tells surely, whether it is still the same."""

    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str | None = None

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return the state of a file without reading it; sha256 is None.

        Raises:
            DataError: if the file is gone.
        """
        with readable(path):
            status = path.stat()
        return cls(path=str(path), size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)

    def hashed(self) -> Self:
        """Return the state with the hash of the file's content.

        Raises:
            DataError: if the file cannot be read.
        """
        with readable(Path(self.path)), Path(self.path).open("rb") as file:
            return self.model_copy(update={"sha256": hashlib.file_digest(file, "sha256").hexdigest()})


@contextmanager
def sole_builder(folder: Path, *, waiting: Callable[[], None]) -> Iterator[bool]:
    """Keep other processes from building `folder`; call `waiting` first if another one is at it.

    Gives whether that is certain: some file systems have no locks.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        yield _lock(file.fileno(), waiting=waiting)


def remove_remains(folders: Collection[Path]) -> None:
    """Remove what killed builds of these folders of one cache left; only where nobody else can be building them."""
    names = {folder.name for folder in folders}
    for cache in {folder.parent for folder in folders}:
        for path in list(cache.glob(".*")):
            if path.name.split(".")[1] in names:
                shutil.rmtree(path, ignore_errors=True)


def new_name(folder: Path) -> Path:
    """Return a name for a folder that may become `folder`; if it does not, the next builder removes it."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")


def publish(temporary: Path, folder: Path, *, unless: Callable[[], bool]) -> None:
    """Let a folder of a name from `new_name` become `folder`, replacing what was there.

    Where there are no locks, another builder may have been quicker: if `unless` says that what is there now is what was
    built, it stays. Processes that have the old folder's files open keep reading them.
    """
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if unless():
                shutil.rmtree(temporary, ignore_errors=True)
                return
            old = new_name(folder)
            with suppress(FileNotFoundError):  # another builder moved it away first
                folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        else:
            return


def cache_error(cache_dir: str, error: OSError) -> DataError | ResourceError:
    """Say what the system refuses to do in the cache folder."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"data.cache_dir: {cache_dir}: the disk is full ({reason}); tokens need about as much room as the text; "
            "free some or set another folder"
        )
    return DataError(
        f"data.cache_dir: {cache_dir}: cannot be written ({reason}); tokens are kept there; set a folder that this "
        "user can write to"
    )


def _lock(descriptor: int, *, waiting: Callable[[], None]) -> bool:
    """Return whether the lock is held; False where the file system has none, and then the last rename wins."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    return True
