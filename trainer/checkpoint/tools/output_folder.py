"""Create a folder that appears complete or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.atomic_io import sync_files, sync_folder
from trainer.config.nodes import shown_path
from trainer.errors import ConfigError, ResourceError


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that gets its name at the end, unless there was an error.

    A killed process leaves a folder `.export-*`.

    Raises:
        ConfigError: if `out` exists or its parent does not.
        ResourceError: if the disk refuses.
    """
    check_output_folder(out)
    temporary = out.with_name(f".export-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        yield temporary
        sync_files([path for path in temporary.iterdir() if path.is_file()])
        sync_folder(temporary)
        temporary.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent not in (temporary, out.parent):
            raise  # about what is read
        raise ResourceError(
            f"{out}: not written: {error.strerror or error}; free space or name another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output_folder(out: Path) -> None:
    """Raise a ConfigError unless a folder can be created at `out`."""
    if "\0" in str(out):
        raise ConfigError(f"{shown_path(out)}: is not a path; name a folder")
    if out.is_symlink() or out.exists():
        raise ConfigError(f"{out}: exists; name a folder that does not")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: is not a folder; create it first")
