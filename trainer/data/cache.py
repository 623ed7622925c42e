"""A folder that is either whole or not there, however many processes build it and wherever they are killed.

CACHE/NAME                the finished folder; its manifest.json was written last
CACHE/.NAME.RANDOM        being built, or the remains of a killed build: removed by the next builder
CACHE/NAME.lock           locked while somebody builds; the lock ends with its process
"""

import errno
import fcntl
import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from trainer.config.base import Config
from trainer.data.sources.files import readable
from trainer.durable import sync_folder


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
def sole_builder(folder: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Keep other processes from building `folder`; call `waiting` first if another one is at it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        if _lock(file.fileno(), waiting=waiting):
            # Nobody else is building, so these are what a killed build left.
            for remains in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(remains, ignore_errors=True)
        yield


@contextmanager
def published(folder: Path, *, unless: Callable[[], bool]) -> Iterator[Path]:
    """Give a new folder to fill; when the block ends without an error it becomes `folder`, replacing what was there.

    Where there are no locks, another builder may have been quicker: if `unless` says that what is there now is what was
    built, it stays. Processes that have the old folder's files open keep reading them.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        _rename_over(temporary, folder, unless=unless)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a rename there is none


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


def _rename_over(source: Path, target: Path, *, unless: Callable[[], bool]) -> None:
    """Rename a folder to a name that may be taken; a kill in between leaves no folder, never half of one."""
    while True:
        try:
            source.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if unless():
                return
            old = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):  # another builder moved it away first
                target.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        else:
            sync_folder(target.parent)
            return
