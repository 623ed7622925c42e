"""Files that survive a power failure: written whole, flushed, then given their name."""

import os
import uuid
from pathlib import Path


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


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
