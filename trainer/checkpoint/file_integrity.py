"""Compare a checkpoint's files with the sizes and hashes in its manifest. Imports no torch."""

import errno
import hashlib
import os
from pathlib import Path

from trainer.atomic_io import NotRegular, open_regular
from trainer.checkpoint.manifest import MANIFEST, StoredFile
from trainer.errors import CheckpointError, ResourceError, TurnoutError

_DAMAGED = (errno.ENOENT, errno.ENOTDIR, errno.EIO)
"""errno values that mean the file is gone or damaged; all others may be transient."""


def check_file(folder: Path, name: str, stored: StoredFile, *, with_content: bool = True) -> None:
    """Compare a file's size, and its hash if `with_content`, with its entry in the manifest.

    Raises:
        CheckpointError: naming the file and the difference.
        ResourceError: if this process cannot read it now.
    """
    path = folder / name
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes != stored.size_bytes:
                raise CheckpointError(f"{path}: is damaged ({size_bytes} bytes instead of {stored.size_bytes})")
            if with_content and hashlib.file_digest(file, "sha256").hexdigest() != stored.sha256:
                raise CheckpointError(f"{path}: is damaged (its SHA-256 differs from the one in {MANIFEST})")
    except NotRegular:
        raise CheckpointError(f"{path}: is not a regular file") from None
    except OSError as error:
        raise read_error(path, error) from None


def read_error(path: Path, error: OSError) -> TurnoutError:
    """Return the error to raise for a failed read: damaged, or unreadable for now and possibly intact."""
    if error.errno in _DAMAGED:
        return CheckpointError(f"{path}: is damaged ({error.strerror})")
    return ResourceError(f"{path}: cannot be read now: {error.strerror}; it may be intact: fix the cause and try again")
